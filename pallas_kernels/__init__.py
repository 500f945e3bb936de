"""Operations over compressed weights and paged caches: contracts, plain-JAX references, ordered backends.

Knows arrays and block formats, nothing of models. Depends on jax alone.
"""
