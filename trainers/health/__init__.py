"""What watches a run: nodes, slow ranks, hanging ranks, spikes."""
