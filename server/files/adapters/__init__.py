"""Low-rank adapters in folders of the `peft` library: read with their scales, applied to a base, merged and written."""
