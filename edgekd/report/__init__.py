# SPDX-License-Identifier: Apache-2.0
"""The report of a verdict: collected once, rendered as JSON, Markdown and text."""
