"""Paged caches: which a layer owns, which pages a sequence holds, where the rows live."""
