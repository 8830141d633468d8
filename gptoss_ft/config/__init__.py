"""Typed configuration: `schema` says what can be set, `catalog` lists it, `load` reads it."""
