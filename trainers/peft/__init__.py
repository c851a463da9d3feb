"""Parameter-efficient methods. The peft library says what an adapter is, how it begins and is saved; only here is it imported."""
