"""Crossdock: expert-parallel training of mixture-of-experts models that plans where experts live and hides their traffic.

Letters used in shapes and as suffixes of tensors everywhere in the package:

    T  tokens (of one rank, unless said otherwise)      D  model width            F  expert hidden width
    E  logical experts                                  K  experts per token      S  expert slots per rank
    R  ranks of one expert-parallel group (= devices)   N  nodes                  L  MoE layers
    A  assignments, the (token, expert, weight) list    M  rows received by a rank, one per (copy, local expert)
    Q  sequences                                        C  token copies on the wire
"""

__version__ = "0.1.0"
