"""What a training saves, goes on from, and shows on the Hub: the parts of Trainer that are wrong or silent for a
vision-language model that plays rounds."""

import os
from functools import partial

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from trl.trainer.utils import get_config_model_id

from .hub import tell_failed_job, telling_failure
from .launch_checks import TRAINER_STATE, check_resume, newest_checkpoint
from .model_card import STATE_FILE, base_license, draw_rollouts, drop_picture, write_training_card
from .samplers import EpochSampler


class Checkpoints:
    """
    Mixin of [`~mgpo_trl.MGPOTrainer`], before [`~trl.GRPOTrainer`]. What changes: a run goes on from whole checkpoints
    only, with their weights and the rows that were left; every saved model carries its conversation; a process that
    dies while saving leaves no state behind; the model card is ours, and no push fails in silence.
    """

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """As in Trainer, but never from a checkpoint that a run died in: `True` takes the newest whole one."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            check_resume(resume_from_checkpoint, self.args)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _get_train_sampler(self, dataset=None):
        """A resumed run goes on with the rows that its epoch has left."""
        return EpochSampler(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _init_training_state(self, *args, **kwargs):
        """
        A resumed run enters its generation window where it was left: TRL counts its micro-batches from 0 again, and
        every later window would begin too late. What is left of the window is sampled anew.
        """
        epochs_trained, batches_trained = super()._init_training_state(*args, **kwargs)
        self._step, self._buffered_inputs = batches_trained, None
        return epochs_trained, batches_trained

    def _save(self, output_dir=None, state_dict=None):
        """Every saved model carries its conversation, so that evaluation and inference ask it as it was trained."""
        super()._save(output_dir, self._without_copies(state_dict))
        if self.args.should_save:
            self.conversation.save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """A state that an earlier run left for this step goes first: it would vouch for half-written files."""
        state = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}", TRAINER_STATE)
        if self.args.should_save and os.path.exists(state):
            os.remove(state)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        """The card of [`~mgpo_trl.model_card`] in place of TRL's, and the files that it is made from."""
        if not self.is_world_process_zero():
            return
        output_dir, base_model = self.args.output_dir, get_config_model_id(self.model.config)
        self.conversation.save(output_dir)  # a push while training takes the files that lie here
        self.state.save_to_json(os.path.join(output_dir, STATE_FILE))
        if self.args.card_picture:
            draw_rollouts(self._pictured, output_dir, f"training, step {self.state.global_step}")
        else:
            drop_picture(output_dir)
        write_training_card(
            self.args,
            self.conversation,
            base_model,
            name=model_name,
            repo_id=self.hub_model_id,
            dataset=dataset_name,
            license=base_license(base_model) if self.args.push_to_hub else None,
            tags=[tags] if isinstance(tags, str) else tags,
        )

    def push_to_hub(self, *args, **kwargs):
        """As in Trainer; a push that fails says where the model lies and how to push it again."""
        with telling_failure(self.args.output_dir, self.hub_model_id, self.args.hub_revision):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        """As in Trainer, where a push in the background that fails is never heard of."""
        known = self._push_jobs()
        super()._push_from_checkpoint(checkpoint_folder)
        for job in self._push_jobs():
            if job not in known:
                job.add_done_callback(partial(tell_failed_job, args=self.args))

    def _push_jobs(self) -> list:
        pushing = getattr(self, "push_in_progress", None)
        return [] if pushing is None else list(pushing.jobs)

    def _save_rng_state(self, output_dir):
        """
        The last file of every process. Waiting for all of them leaves the trainer's state, which the first process
        writes next, the last file of a checkpoint: where it is missing, a process died while saving.
        """
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _keep_used_names(self) -> None:
        """
        Under ZeRO-3, transformers keeps every rule that could have renamed a weight on loading, not only those that
        did, and undoes all of them on saving: the names would be those of no published checkpoint.
        """
        rules = getattr(self.model, "_weight_conversions", None)
        if rules is not None:
            self.model._weight_conversions = [rule for rule in rules if rule.was_used()]

    def _without_copies(self, state_dict: dict | None) -> dict | None:
        """DeepSpeed and FSDP gather tied weights as separate tensors: leave out those that others stand for."""
        if state_dict is None:
            return None
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
        return {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        live = self.model if model is None else model
        if not self._load_full_weights(resume_from_checkpoint, live):
            # Loading turns adapters into fp32, also those on 4-bit weights, which TRL trains in bf16.
            dtypes = {name: value.dtype for name, value in live.named_parameters() if value.requires_grad}
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            for name, dtype in dtypes.items():
                parameter = live.get_parameter(name)
                parameter.data = parameter.data.to(dtype)

    def _load_best_model(self):
        if not self._load_full_weights(self.state.best_model_checkpoint, self.model):
            super()._load_best_model()

    def _load_full_weights(self, directory: str, model) -> bool:
        """
        Full weights of a vision-language model are saved under the Hub's names, which are not the live model's:
        Trainer would match none of them and go on with the weights at hand. `from_pretrained` translates the names.
        Adapters, DeepSpeed and FSDP are left to Trainer (`False`).
        """
        names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        has_weights = any(os.path.isfile(os.path.join(directory, name)) for name in names)
        if not has_weights or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return False
        saved = type(model).from_pretrained(directory, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return True
