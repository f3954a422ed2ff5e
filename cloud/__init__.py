"""The aggregator: a round's sealed updates in, the next plan and adapter out."""
