"""Operations on compressed weights and paged caches: contracts, references in plain JAX, ordered backends.

Deals with arrays and block formats, not with models, and depends on jax alone.
"""
