"""The Ascend adapters against the real torch_npu wheel, on a machine without an NPU and without CANN.

`environment` fetches the wheel, `stub` stands in for the CANN libraries it is linked against, `process` runs
everything that needs it in a process of its own, `versions` reads the schemas of other releases.
"""
