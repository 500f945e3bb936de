"""The HTTP server over an engine: OpenAI's API and our own. docs/server.md says what it does.

The event loop never waits for the engine, and the engine never for the event loop: requests are prepared and submitted in a
pool of threads (`service`), the engine's threads only leave a note that something has arrived (`answers`), and what has
arrived by the time the loop looks is sent together. `apis` has one module for each family of routes.
"""

from ferrum_jax.server.app import create_app
from ferrum_jax.server.settings import Settings

__all__ = ["Settings", "create_app"]
