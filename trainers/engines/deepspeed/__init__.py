"""DeepSpeed's ZeRO stage 3: settings -> partitions -> state -> engine."""
