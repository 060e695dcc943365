"""The exact top-k encode and the gather decode. This is internal: use `ScopeSAE` instead."""
