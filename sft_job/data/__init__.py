"""From parquet files to packed batches: files, rendering, token cache, order, packing."""
