"""The compiled plugin: tools and headers, its build, and the cache that it is kept in."""
