"""Supervised fine-tuning with transformers' Trainer, then the saved adapter in a fresh model.

python examples/sft.py            # minutes on two CPU cores
python examples/sft.py --short    # to see that it runs
"""

from common import load, parse, parser, sums
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, Trainer, TrainingArguments

from gralora import LoraConfig


def answer(model: PeftModel, tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    prompt = tokenizer(f"Next after {number}:", return_tensors="pt").to(model.device)
    output = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> float:
    """Returns the held-out loss."""
    args = parse(parser("SFT with GraLoRA and the Trainer.", steps=40), argv)
    model, tokenizer = load(args)
    config = LoraConfig(
        use_gralora=True,
        gralora_scaling="matched",
        r=32,
        lora_alpha=64,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    rows = sums(tokenizer, 80)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=rows[:64],
        eval_dataset=rows[64:],
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss: {before:.3f} -> {after:.3f}")

    model.save_pretrained(args.out)
    loaded = AutoPeftModelForCausalLM.from_pretrained(args.out)  # gralora must be imported
    right = sum(answer(loaded, tokenizer, number) == f" {number + 1}" for number in range(64, 80))
    print(f"the saved adapter, loaded again, has {right} of 16 held-out answers right")
    return after


if __name__ == "__main__":
    main()
