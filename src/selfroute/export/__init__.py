"""A trained device model as files that other engines load."""
