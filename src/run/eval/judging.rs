//! A safety judge in the same program: it reads the answers after the evaluated model is freed.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Map;

use super::answers::Asked;
use super::judge_prompt::{Asking, JudgeTemplate};
use super::logged::{Generated, Logged, open_on_first, wrong_row};
use super::options::config_hash;
use crate::backend::Backend;
use crate::collective::{Collective, all_agree, all_ok, on_first};
use crate::config::{EvalArgs, RunConfig, Transport};
use crate::data::{ChatTokenizer, Penalties};
use crate::exit::{self, Context, Failure, Result};
use crate::files;
use crate::input;
use crate::judge::{Assessment, JudgeForm, Rate, Safety, cohen_kappa};
use crate::launch::memory::human;
use crate::launch::{Device, Opened, Rank, hub_cache};
use crate::model::{Checkpoint, Model, ModelConfig, ParamTable};
use crate::report::{
    Compared, FinishReason, JudgeModel, JudgeReport, ListAgreement, PromptSide, RowLog, Sampling, SideVerdicts,
    VERDICT_SCHEMA, VerdictRow, json_lines,
};
use crate::run::generate::{Answer, PROMPT_TOKENS, Prompt};
use crate::run::other_routing::weights_sha;
use crate::run::refusals::LISTS;
use crate::run::session::workload;
use crate::train::Replica;
use crate::ui::Ui;

/// Name of the file of verdicts.
pub const FILE: &str = "verdicts.jsonl";

/// A judge, opened.
pub struct Judge {
    config: ModelConfig,
    table: ParamTable,
    tokenizer: ChatTokenizer,
    asking: Asking,
    penalties: Penalties,
    /// What `eval.json` says of it.
    pub model: JudgeModel,
}

impl Judge {
    /// As [`ChatTokenizer::note`].
    pub fn note(&self) -> Option<String> {
        self.tokenizer.note()
    }

    /// Opens and checks the judge of `--judge`; `None` without one.
    ///
    /// # Errors
    /// A model, a tokenizer or a template file that cannot be opened or is damaged; a model of a family whose form of verdicts is
    /// not known, without an option that says it.
    pub fn open(args: &EvalArgs, device: &Device) -> Result<Option<Self>> {
        let Some(name) = &args.judge else { return Ok(None) };
        let dir = hub_cache().resolve(name)?;
        let config = ModelConfig::from_dir(&dir)?;
        let kwargs = args.judge_chat_template_kwargs.as_ref().map_or_else(Map::new, |kwargs| kwargs.0.clone());
        let asking = match (&args.judge_template, args.judge_form, &*config.model_type) {
            (Some(path), ..) => Asking::Template(Box::new(JudgeTemplate::read(path)?)),
            (None, Some(form), _) => Asking::Published(form, kwargs),
            (None, None, "qwen3") => Asking::Published(JudgeForm::Qwen3guard, kwargs),
            (None, None, "llama") => Asking::Published(JudgeForm::LlamaGuard, kwargs),
            (None, None, family) => {
                let message = format!(
                    "--judge {}: in which form a model of the family {family} judges is not known: give --judge-form, or \
                     --judge-template with the prompt and the patterns of its verdicts",
                    dir.display()
                );
                return Err(Failure::new(exit::CONFIG, message));
            }
        };
        let table =
            ParamTable::build(&config, &Checkpoint::open(&dir)?).context(format!("--judge {}", dir.display()))?;
        table.check_finite().context(format!("the checkpoint {} is damaged: fetch it again", dir.display()))?;
        let mut tokenizer = ChatTokenizer::open(&dir, None)?;
        tokenizer.check_vocab(config.vocab_size)?;
        if let Some(name) = asking.unread_variable(&tokenizer) {
            let message = format!(
                "--judge {}: its chat template does not read {name:?}, which {} gives",
                dir.display(),
                match args.judge_template {
                    Some(_) => "chat_template_kwargs of the file of --judge-template",
                    None => "--judge-chat-template-kwargs",
                }
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
        let precision = device.number_format(args.precision, workload(&config, &table, 0).stored)?;
        let model = JudgeModel {
            config_sha: format!("blake3:{}", config_hash(&dir)?),
            path: dir,
            sha: weights_sha(&table),
            form: asking.name().into(),
            template_sha: format!("blake3:{}", asking.digest(&tokenizer)),
            max_new_tokens: args.judge_max_new_tokens,
            precision,
        };
        let penalties = tokenizer.penalties()?;
        Ok(Some(Self { config, table, tokenizer, asking, penalties, model }))
    }

    /// Checks what can be known of the judge's prompts before there is an answer: that its templates render each conversation, with the
    /// answer in it, in a length that the judge can read. `answer_tokens`: the largest number of tokens of an answer.
    ///
    /// # Errors
    /// A conversation that a template refuses or renders as nothing; templates that leave the answer out; a prompt that is too long.
    pub fn check(&self, asked: &[Asked<'_>], answer_tokens: usize, ui: &Ui) -> Result<()> {
        let prompts_with = |asked: &[Asked<'_>], response: &str| {
            asked.iter().map(|asked| self.prompt(asked, response)).collect::<Result<Vec<_>>>()
        };
        let prompts = prompts_with(asked, "Sure.")?;
        // A template may refuse an empty answer.
        let empty = prompts_with(&asked[..asked.len().min(1)], "").ok();
        if empty.is_some_and(|empty| empty.first().is_some_and(|first| *first == prompts[0])) {
            let message = format!(
                "--judge {}: its prompt does not depend on the answer: its chat template leaves the answer out; --judge-template gives a prompt",
                self.model.path.display()
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
        let longest = self.check_length(asked, &prompts)?;
        if let Some(limit) = self.config.rope_limit.filter(|limit| longest.saturating_add(answer_tokens) > *limit) {
            ui.warn(format_args!(
                "the judge reads at most {limit} tokens, and its prompts have up to {longest}, with room for its verdict and without the \
                 answer: an answer of --max-new-tokens {answer_tokens} may be too long for it"
            ));
        }
        Ok(())
    }

    /// The judge's prompt about an answer, in tokens.
    fn prompt(&self, asked: &Asked<'_>, response: &str) -> Result<Vec<u32>> {
        let failed = |why: String| {
            let path = self.model.path.display();
            Failure::new(exit::DATA, format!("--judge {path}: its prompt for answer {}: {why}", asked.id()))
        };
        let text = self.asking.prompt(&self.tokenizer, asked.messages, response).map_err(&failed)?;
        let ids = self.tokenizer.encode(&text)?;
        if ids.is_empty() { Err(failed("it is empty".into())) } else { Ok(ids) }
    }

    /// The tokens of the longest of these prompts with its verdict.
    ///
    /// # Errors
    /// It is too long for the judge.
    fn check_length(&self, asked: &[Asked<'_>], prompts: &[Vec<u32>]) -> Result<usize> {
        let JudgeModel { path, max_new_tokens, .. } = &self.model;
        let longest = prompts.iter().zip(asked).max_by_key(|(ids, _)| ids.len());
        let Some((longest, asked)) = longest.map(|(ids, asked)| (ids.len().saturating_add(*max_new_tokens), asked))
        else {
            return Ok(0);
        };
        match self.config.rope_limit {
            Some(limit) if longest > limit => {
                let message = format!(
                    "--judge {}: its prompt for answer {} has {longest} tokens with the {max_new_tokens} of its verdict, and its rope \
                     scaling allows {limit}: lower --judge-max-new-tokens, leave the row out, or take another judge",
                    path.display(),
                    asked.id()
                );
                Err(Failure::new(exit::CONFIG, message))
            }
            _ => Ok(longest),
        }
    }

    /// Opens the device of a rank for the judge: its weights decide the number format with `--precision auto`.
    ///
    /// # Errors
    /// Those of [`Device::open`].
    pub fn device(&self, device: &Device, config: &RunConfig, rank: &Rank) -> Result<Opened> {
        // Ranks exchange texts, and no tensors. The user knows the device by now.
        let config = RunConfig { transport: Transport::Host, ..config.clone() };
        let Rank { local_rank, local_world_size, .. } = *rank;
        let (world, stop, fault) = (rank.world.clone(), rank.stop.clone(), rank.fault.clone());
        let rank = Rank { world, local_rank, local_world_size, ui: Ui::silent(), stop, fault };
        device.open(&config, workload(&self.config, &self.table, PROMPT_TOKENS), &rank)
    }

    /// What decides its verdicts, for the check that all ranks have the same.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.model).expect("a judge has string keys")
    }

    /// A hash of all that decides the judge's text on this prompt.
    fn key(&self, prompt: &[u32]) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("moewarden verdict of a judge 2");
        let eos = self.tokenizer.eos_ids();
        let JudgeModel { sha, config_sha, max_new_tokens, precision, .. } = &self.model;
        hasher.update(format!("{sha} {config_sha} {max_new_tokens} {precision} {eos:?}").as_bytes());
        hasher.update(self.penalties.key().as_bytes());
        prompt.iter().for_each(|id| _ = hasher.update(&id.to_le_bytes()));
        hasher.finalize().to_hex().to_string()
    }
}

/// What the judge reads.
pub struct Judging<'a> {
    pub judge: &'a Judge,
    pub asked: &'a [Asked<'a>],
    /// The text of the answer to each prompt.
    pub responses: &'a [&'a str],
    /// Verdicts that are generated together on a rank.
    pub batch_size: usize,
    /// The file, which may hold verdicts of an earlier run.
    pub path: PathBuf,
    pub ui: &'a Ui,
}

impl Judging<'_> {
    /// The verdicts on all answers, in their order, the same on all ranks. Those that the file holds are not generated again. At the end the file holds the verdicts
    /// on all answers, in the order of the data file, and no others.
    ///
    /// # Errors
    /// A template that refuses a conversation; prompts too long for the judge; logits that are not finite; a file with other rows;
    /// a failed write; those of the collective.
    pub fn verdicts<B: Backend>(&self, backend: Arc<B>, rank: &Rank) -> Result<Generated<Vec<VerdictRow>>> {
        let (judge, ui) = (self.judge, self.ui);
        let world = &*rank.world;
        world.set_activity("judging the answers");
        ui.line(format_args!(
            "judge {}: {} ({}), {}, loaded in place of the evaluated model; products in {}",
            judge.model.path.display(),
            judge.config.model_type,
            judge.model.form,
            human(judge.table.total().bytes as u64),
            judge.model.precision
        ));
        let prompts = all_ok(world, self.prompts())?;
        let keys: Vec<String> = prompts.iter().map(|ids| judge.key(ids)).collect();
        let kept = open_on_first(world, || {
            let (log, lines) = RowLog::open(&self.path)?;
            Ok((log, self.read(&keys, &lines)?))
        })?;
        let model = Model::new(backend, judge.config.clone(), judge.table.clone());
        let mut replica = Replica::new(model, rank.world.clone());
        replica.stop = rank.stop.clone();
        let logged = Logged {
            what: "verdicts",
            limit: "--judge-max-new-tokens",
            eos: judge.tokenizer.eos_ids(),
            sampling: &Sampling::greedy(judge.model.max_new_tokens).with(judge.penalties),
            batch_size: self.batch_size,
            ui,
        };
        let asked: Vec<_> = prompts.iter().map(|ids| Prompt { ids, index: 0 }).collect();
        let row = |i: usize, said: &Answer| self.row(i, &keys[i], said);
        let append = |log: &mut RowLog, new: &[(usize, Answer)]| -> Result<()> {
            Ok(log.append(new.iter().map(|(i, said)| row(*i, said)))?)
        };
        logged.generate(&replica, &asked, kept, append)?.try_map(|said| {
            let rows: Vec<VerdictRow> = said.iter().enumerate().map(|(i, answer)| row(i, answer)).collect();
            on_first(world, || Ok(files::write(&self.path, json_lines(&rows))?))?;
            self.warn_of_missing(&rows);
            Ok(rows)
        })
    }

    /// The judge's prompts, in tokens.
    fn prompts(&self) -> Result<Vec<Vec<u32>>> {
        let both = self.asked.iter().zip(self.responses);
        let prompts = both.map(|(asked, response)| self.judge.prompt(asked, response)).collect::<Result<Vec<_>>>()?;
        self.judge.check_length(self.asked, &prompts)?;
        Ok(prompts)
    }

    /// The judge's texts in these lines of the file, of the answers with these keys. Verdicts of another judge, or on other answers,
    /// are left out.
    fn read(&self, keys: &[String], lines: &[String]) -> Result<Vec<Option<Answer>>> {
        let mut rows = std::collections::BTreeMap::new();
        for (i, line) in lines.iter().enumerate() {
            let wrong = |why: &str| wrong_row(&self.path, i + 1, "verdict", why);
            let row: VerdictRow =
                serde_json::from_str(line).map_err(|e| wrong(&input::line_problem(line.as_bytes(), &e)))?;
            if row.schema != VERDICT_SCHEMA {
                return Err(wrong(&format!("its schema is {:?}, not {VERDICT_SCHEMA:?}", row.schema)));
            }
            rows.insert((row.id, row.key), Answer { ids: row.ids, finish: row.finish_reason });
        }
        let of = |(asked, key): (&Asked<'_>, &String)| rows.get(&(asked.id(), key.clone())).cloned();
        Ok(self.asked.iter().zip(keys).map(of).collect())
    }

    fn row(&self, i: usize, key: &str, said: &Answer) -> VerdictRow {
        let text = self.judge.tokenizer.decode(&said.ids);
        // A text that was cut off may lack what would change the verdict.
        let whole = said.finish == FinishReason::Stop;
        VerdictRow {
            schema: VERDICT_SCHEMA.into(),
            id: self.asked[i].id(),
            key: key.to_owned(),
            ids: said.ids.clone(),
            finish_reason: said.finish,
            verdict: whole.then(|| self.judge.asking.parse(&text)).flatten(),
            text,
        }
    }

    fn warn_of_missing(&self, rows: &[VerdictRow]) {
        let (all, model) = (rows.len(), &self.judge.model);
        let (cut, missing): (Vec<_>, Vec<_>) =
            rows.iter().filter(|row| row.verdict.is_none()).partition(|row| row.finish_reason == FinishReason::Length);
        let (cut, missing) = (cut.len(), missing.len());
        if 10 * (cut + missing) <= all {
            return;
        }
        if cut > 0 {
            self.ui.warn(format_args!(
                "{cut} of {all} texts of the judge were cut off at --judge-max-new-tokens {}, so that they count as without a verdict: raise \
                 it. The texts are in {FILE}",
                model.max_new_tokens
            ));
        }
        if missing > 0 {
            self.ui.warn(format_args!(
                "{missing} of {all} texts of the judge hold no verdict in the form {}, though they are whole: is it a judge of this form? The texts are in {FILE}",
                model.form
            ));
        }
    }

    /// Shares of verdicts, and agreement with the phrase lists.
    pub fn report(&self, rows: &[VerdictRow]) -> JudgeReport {
        let sides = [PromptSide::Unsafe, PromptSide::Safe];
        let of_side = |side: PromptSide| {
            let rows =
                self.asked.iter().zip(self.responses).zip(rows).filter(move |((asked, _), _)| asked.side == side);
            rows.map(|((_, response), row)| (response, &row.verdict))
        };
        let knows_controversial = self.judge.asking.knows_controversial();
        let verdicts = |side| {
            let found: Vec<&Option<Assessment>> = of_side(side).map(|(_, verdict)| verdict).collect();
            let parsed = || found.iter().filter_map(|verdict| verdict.as_ref());
            SideVerdicts {
                side,
                answers: found.len(),
                unparsable: found.len() - parsed().count(),
                unsafe_: Rate::of(parsed().map(|v| v.safety == Safety::Unsafe)),
                controversial: Rate::of(
                    parsed().filter(|_| knows_controversial).map(|v| v.safety == Safety::Controversial),
                ),
                refusals: Rate::of(parsed().filter_map(|v| v.refusal)),
            }
        };
        let says = |compared, verdict: &Assessment| match compared {
            Compared::Refusal => verdict.refusal,
            Compared::Unsafe => Some(verdict.safety == Safety::Unsafe),
        };
        let compared = [
            (PromptSide::Unsafe, Compared::Refusal),
            (PromptSide::Safe, Compared::Refusal),
            (PromptSide::Unsafe, Compared::Unsafe),
        ];
        let agreement = LISTS.iter().flat_map(|list| compared.map(|(side, compared)| (list, side, compared)));
        let agreement = agreement.map(|(list, side, compared)| {
            let pair = |(response, verdict): (&&str, &Option<Assessment>)| {
                let judge = says(compared, verdict.as_ref()?)?;
                Some((judge, list.is_refusal(response) == (compared == Compared::Refusal)))
            };
            let pairs: Vec<(bool, bool)> = of_side(side).filter_map(pair).collect();
            ListAgreement {
                list: list.id(),
                side,
                compared,
                answers: pairs.len(),
                agree: Rate::of(pairs.iter().map(|(judge, list)| judge == list)).rate,
                kappa: cohen_kappa(pairs),
            }
        });
        JudgeReport {
            model: self.judge.model.clone(),
            sides: sides.map(verdicts).into_iter().filter(|side| side.answers > 0).collect(),
            agreement: agreement.filter(|found| found.answers > 0).collect(),
        }
    }
}

/// Whether all ranks have the same judge.
///
/// # Errors
/// The rank that has another one.
pub fn agree(judge: Option<&Judge>, world: &dyn Collective) -> Result<()> {
    Ok(all_agree(world, "judge", &judge.map_or_else(Vec::new, Judge::to_bytes))?)
}
