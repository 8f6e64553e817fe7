"""What Ray imports first into each process of a cluster that we have started: see `orchestrator.process`."""

from orchestrator.process import begin

begin()
