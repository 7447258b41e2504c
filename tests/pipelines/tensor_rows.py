"""A row for the model ``twice``, as the tensor doors take it."""

ROWS = {"name": "rows", "datatype": "FP32", "shape": [1, 1], "data": [2.5]}
