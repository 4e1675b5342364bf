"""Executors leased on nodes, and reached over shared memory, RDMA or TCP (rFaaS, IPDPS '23)."""
