"""Executors leased on nodes and reached over RDMA (rFaaS, IPDPS '23): not built yet."""
