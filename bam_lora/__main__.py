"""`python -m bam_lora` is `bam-lora`."""

from bam_lora.cli import main

if __name__ == "__main__":
    main()
