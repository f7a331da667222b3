"""The artefact on disk (HDF5, format 1): `format` owns the layout, `writer` is atomic, `reader` distrusts."""
