"""Starting a run on many hosts: one `head`, and a `worker` on every other one.

    head                                     worker
    preflight, plan, check                   preflight
    opens the meeting, starts Ray            calls until the head answers, or its deadline
      <- hello: versions, code, clock, devices --
      -- welcome: what it has to see, or why it is refused ->
    waits until all hosts are ready            <- ready -
      -- go: where Ray is -------------------> starts Ray, which joins
    starts the driver (miles-lite train)       <- joined -
      -- end: status of the run -------------> stops Ray, leaves with that status

The connection of the meeting stays open and beats, so that each side sees the other die. All that
is started dies with who started it, and is stopped by process id.
"""
