"""Typed configuration: `schema` and `commands` say what can be set, `catalog` lists it, `load` reads it."""
