# SPDX-License-Identifier: Apache-2.0
"""The pipeline, one module a stage; none imports another."""
