"""What a run learned, what it forgot and what it cost: report.json, HTML, text, model card. Loads no torch."""

from bam_lora.report.card import adapter_card, model_card
from bam_lora.report.card_files import write_card
from bam_lora.report.collect import collect
from bam_lora.report.compare import compare
from bam_lora.report.html import render_html
from bam_lora.report.plots import write_plots
from bam_lora.report.text import render_text
from bam_lora.report.write import write_report

__all__ = [
    "adapter_card",
    "collect",
    "compare",
    "model_card",
    "render_html",
    "render_text",
    "write_card",
    "write_plots",
    "write_report",
]
