//! The work of passes through a model, counted from its shape.

use std::ops::{Add, Index, IndexMut, Mul};

use crate::model::{LayerKind, ModelConfig};

/// A kind of work. Each has its own rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The dense layers: projections of attention, routers, shared and dense blocks.
    Dense,
    /// The gradients of their inputs.
    DenseInput,
    /// Attention.
    Attention,
    /// Its backward.
    AttentionBackward,
    /// The routed experts.
    Experts,
    /// The gradients of their inputs.
    ExpertsInput,
    /// The gradients of their weights, reduced to scores.
    ExpertScores,
    /// The gradients of weights, accumulated.
    Gradients,
    /// The head with the cross-entropy.
    Head,
    /// Its backward to the inputs, which computes the logits as well.
    HeadBackward,
    /// Elements of the weights that the products of few rows read, not floating-point operations.
    FewRows,
    /// Updated elements, not floating-point operations.
    Update,
    /// Elements of random weights, not floating-point operations.
    Random,
}

const KINDS: usize = Kind::Random as usize + 1;

impl Kind {
    /// All kinds.
    pub const ALL: [Self; KINDS] = [
        Self::Dense,
        Self::DenseInput,
        Self::Attention,
        Self::AttentionBackward,
        Self::Experts,
        Self::ExpertsInput,
        Self::ExpertScores,
        Self::Gradients,
        Self::Head,
        Self::HeadBackward,
        Self::FewRows,
        Self::Update,
        Self::Random,
    ];

    /// Whether it is counted in floating-point operations.
    fn is_arithmetic(self) -> bool {
        !matches!(self, Self::FewRows | Self::Update | Self::Random)
    }
}

/// An amount of each kind of work: floating-point operations (a multiplication and an addition are two), or elements.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work([f64; KINDS]);

impl Work {
    /// An amount of one kind.
    pub fn of(kind: Kind, amount: f64) -> Self {
        let mut work = Self::default();
        work[kind] = amount;
        work
    }

    /// All floating-point operations.
    pub fn flops(&self) -> f64 {
        Kind::ALL.iter().filter(|kind| kind.is_arithmetic()).map(|&kind| self[kind]).sum()
    }
}

impl Index<Kind> for Work {
    type Output = f64;
    fn index(&self, kind: Kind) -> &f64 {
        &self.0[kind as usize]
    }
}

impl IndexMut<Kind> for Work {
    fn index_mut(&mut self, kind: Kind) -> &mut f64 {
        &mut self.0[kind as usize]
    }
}

impl Add for Work {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
}

impl Mul<f64> for Work {
    type Output = Self;
    fn mul(self, factor: f64) -> Self {
        Self(self.0.map(|amount| amount * factor))
    }
}

/// Tokens of some sequences.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tokens {
    /// All of them.
    pub all: f64,
    /// Those that carry loss.
    pub loss: f64,
    /// Sequences.
    pub sequences: f64,
    /// Σ length², for the token-weighted mean length.
    pub squares: f64,
}

impl Tokens {
    /// Of sequences of these lengths and numbers of tokens with loss.
    pub fn of<'a>(lengths: impl Iterator<Item = (usize, usize)> + 'a) -> Self {
        lengths.fold(Self::default(), |sum, (all, loss)| Self {
            all: sum.all + all as f64,
            loss: sum.loss + loss as f64,
            sequences: sum.sequences + 1.0,
            squares: sum.squares + (all * all) as f64,
        })
    }

    /// Scales these counts to `sequences` sequences of the same mean length; zero counts stay zero.
    #[must_use]
    pub fn like(self, sequences: f64) -> Self {
        let factor = sequences / self.sequences.max(1.0);
        let Self { all, loss, squares, .. } = self;
        Self { all: all * factor, loss: loss * factor, squares: squares * factor, sequences }
    }

    /// The length of the sequence that a token stands in, on average over tokens.
    pub fn mean_length(&self) -> f64 {
        self.squares / self.all.max(1.0)
    }
}

/// The work of a step of generation that adds a token to each of `sequences` sequences: the elements of all weights that it
/// reads. Of E experts with K a token, E (1 - (1 - K/E)^sequences) of a layer are read, if tokens choose them evenly.
pub fn generation_step(config: &ModelConfig, sequences: usize) -> Work {
    let (d, experts) = (config.hidden_size as f64, config.num_experts.max(1) as f64);
    let unread = (1.0 - config.num_experts_per_tok as f64 / experts).powi(i32::try_from(sequences).unwrap_or(i32::MAX));
    let mut elements = d * config.vocab_size as f64;
    for (kind, heads) in config.layers.iter().zip(&config.heads) {
        elements += d * ((2 * heads.queries + 2 * heads.keys) * heads.dim) as f64;
        elements += 3.0
            * d
            * match kind {
                LayerKind::Dense(width) => *width as f64,
                LayerKind::Moe => {
                    let shared = config.shared_expert_width.unwrap_or(0) as f64;
                    shared + experts * (1.0 - unread) * config.expert_width as f64
                }
            };
    }
    Work::of(Kind::FewRows, elements)
}

/// Floating-point operations of one token, forward.
///
/// ```text
/// dense      2 Σ_layers D (2 q + 2 kv) + (E D, and 3 D times the width of a shared or dense block)
/// experts    2 Σ_layers 3 K F D
/// attention  4 Σ_layers (S/2) q             causal, S the mean sequence length seen by a token
/// head       2 D V                          for tokens that carry loss
/// ```
///
/// A backward to the inputs does dense layers, experts and the head once more, and attention 2.5 times. The gradients of the
/// experts' weights are the experts once more. Behind attention, the last layer of a pass that ends at the loss works on the
/// tokens that carry loss. A backward that needs only the experts of the lowest layer does nothing below their hidden states.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenWork {
    layers: LayerWork,
    lowest: LayerWork,
    /// The last layer behind attention.
    last: LayerWork,
    head: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct LayerWork {
    dense: f64,
    experts: f64,
    attention: f64,
}

impl TokenWork {
    /// For sequences of this mean length.
    pub fn new(config: &ModelConfig, length: f64) -> Self {
        let d = config.hidden_size as f64;
        let mut sum = LayerWork::default();
        let (mut lowest, mut last) = (None, sum);
        for (kind, heads) in config.layers.iter().zip(&config.heads) {
            let (q, kv) = ((heads.queries * heads.dim) as f64, (heads.keys * heads.dim) as f64);
            let seen = (length / 2.0).min(heads.window.unwrap_or(usize::MAX) as f64);
            let (block, experts) = match kind {
                LayerKind::Dense(width) => (6.0 * d * *width as f64, 0.0),
                LayerKind::Moe => {
                    let shared = config.shared_expert_width.map_or(0.0, |width| d * (3 * width + 1) as f64);
                    let routed = 6.0 * (config.num_experts_per_tok * config.expert_width) as f64 * d;
                    (2.0 * (config.num_experts as f64 * d + shared), routed)
                }
            };
            let layer = LayerWork { dense: 2.0 * d * (2.0 * q + 2.0 * kv) + block, experts, attention: 4.0 * seen * q };
            lowest = lowest.or((experts > 0.0).then_some(layer));
            last = LayerWork { dense: 2.0 * d * q + block, experts, attention: 0.0 };
            sum.dense += layer.dense;
            sum.experts += layer.experts;
            sum.attention += layer.attention;
        }
        let lowest = lowest.unwrap_or_default();
        Self { layers: sum, lowest, last, head: 2.0 * d * config.vocab_size as f64 }
    }

    fn dense(&self, t: &Tokens) -> f64 {
        t.all * self.layers.dense - (t.all - t.loss) * self.last.dense
    }

    fn experts(&self, t: &Tokens) -> f64 {
        t.all * self.layers.experts - (t.all - t.loss) * self.last.experts
    }

    /// A forward pass that ends at the loss.
    pub fn forward(&self, t: &Tokens) -> Work {
        self.hidden(t) + self.logits(t)
    }

    /// A forward pass whose backward computes the loss.
    pub fn hidden(&self, t: &Tokens) -> Work {
        Work::of(Kind::Dense, self.dense(t))
            + Work::of(Kind::Experts, self.experts(t))
            + Work::of(Kind::Attention, t.all * self.layers.attention)
    }

    /// The logits of the tokens that carry loss.
    pub fn logits(&self, t: &Tokens) -> Work {
        Work::of(Kind::Head, t.loss * self.head)
    }

    /// A forward pass that ends at the last router.
    pub fn routing(&self, t: &Tokens) -> Work {
        Work::of(Kind::Dense, t.all * self.layers.dense)
            + Work::of(Kind::Experts, t.all * (self.layers.experts - self.last.experts))
            + Work::of(Kind::Attention, t.all * self.layers.attention)
    }

    /// A forward pass whose activations a backward reads: without the down projections, which are a third of the experts.
    pub fn recomputed(&self, t: &Tokens) -> Work {
        Work::of(Kind::Dense, self.dense(t))
            + Work::of(Kind::Experts, self.experts(t) * 2.0 / 3.0)
            + Work::of(Kind::Attention, t.all * self.layers.attention)
    }

    /// The gradients of all activations. `whole`: down to the embedding, and not only to the lowest experts.
    pub fn backward_inputs(&self, t: &Tokens, whole: bool) -> Work {
        let below = if whole { LayerWork::default() } else { self.lowest };
        Work::of(Kind::DenseInput, self.dense(t) - t.all * below.dense)
            + Work::of(Kind::ExpertsInput, self.experts(t) - t.all * below.experts * 2.0 / 3.0)
            + Work::of(Kind::AttentionBackward, 2.5 * t.all * (self.layers.attention - below.attention))
            + Work::of(Kind::HeadBackward, 2.0 * t.loss * self.head)
    }

    /// The gradients of all routed experts' weights, as scores.
    pub fn backward_scores(&self, t: &Tokens) -> Work {
        Work::of(Kind::ExpertScores, self.experts(t))
    }

    /// The gradients of this share of the routed experts' weights.
    pub fn backward_experts(&self, t: &Tokens, share: f64) -> Work {
        Work::of(Kind::Gradients, self.experts(t) * share)
    }

    /// The gradients of all weights.
    pub fn backward_weights(&self, t: &Tokens) -> Work {
        Work::of(Kind::Gradients, self.dense(t) + self.experts(t) + t.loss * self.head)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::backend::{Heads, Rope};
    use crate::model::{MoeLayers, QkNorm};

    /// allenai/OLMoE-1B-7B-0125-Instruct.
    pub fn olmoe() -> ModelConfig {
        ModelConfig {
            model_type: "olmoe".into(),
            vocab_size: 50304,
            hidden_size: 2048,
            layers: vec![LayerKind::Moe; 16],
            moe_layers: MoeLayers::of(&[LayerKind::Moe; 16]),
            heads: vec![Heads { queries: 16, keys: 16, dim: 128, window: None }; 16],
            num_experts: 64,
            num_experts_per_tok: 8,
            expert_width: 1024,
            renormalize: false,
            shared_expert_width: None,
            qk_norm: QkNorm::WholeWidth,
            clip_qkv: None,
            qkv_bias: false,
            o_bias: false,
            tie_word_embeddings: false,
            rms_norm_eps: 1e-5,
            rope: Rope { inv_freq: vec![1.0; 64], scale: 1.0 },
            rope_limit: None,
        }
    }

    #[test]
    fn work_of_a_known_model() {
        // By hand, GFLOP a token at 512 tokens with loss on all: linear 2.1517, head 0.2060, attention 0.0336, experts' dW
        // 1.6106. Compared to the second decimal.
        let t = Tokens { all: 1.0, loss: 1.0, sequences: 1.0 / 512.0, squares: 512.0 };
        let work = TokenWork::new(&olmoe(), t.mean_length());
        let close = |found: f64, wanted: f64| assert!((found / 1e9 - wanted).abs() < 0.01, "{found} is not {wanted}e9");
        close(work.forward(&t).flops(), 2.39);
        let there_and_back = work.hidden(&t) + work.backward_inputs(&t, true);
        close((there_and_back + work.backward_scores(&t)).flops(), 6.44);
        close((there_and_back + work.backward_experts(&t, 1.0 / 16.0)).flops(), 4.93);
    }

    #[test]
    fn the_last_layer_works_on_tokens_with_loss_and_the_lowest_on_experts() {
        let all = Tokens { all: 8.0, loss: 8.0, sequences: 1.0, squares: 64.0 };
        let few = Tokens { loss: 2.0, ..all };
        let work = TokenWork::new(&olmoe(), 8.0);
        let a_layer = work.forward(&all)[Kind::Experts] / 16.0;
        assert_eq!(work.forward(&few)[Kind::Experts], 15.25 * a_layer);
        assert_eq!(work.routing(&few)[Kind::Experts], 15.0 * a_layer, "the last experts route only");
        assert_eq!(work.forward(&few)[Kind::Attention], work.forward(&all)[Kind::Attention]);
        let [whole, to_experts] = [true, false].map(|whole| work.backward_inputs(&all, whole));
        assert_eq!(to_experts[Kind::AttentionBackward] * 16.0, whole[Kind::AttentionBackward] * 15.0);
        // Of the three products of the lowest layer's experts, only the gradient of the down projection's input.
        let share = to_experts[Kind::ExpertsInput] / a_layer;
        assert!((share - (15.0 + 1.0 / 3.0)).abs() < 1e-9, "{share}");
    }

    #[test]
    fn a_step_of_generation_reads_the_weights_of_its_experts() {
        // OLMoE-1B-7B: 1.28e9 active weights, of them 1.03e8 of the embedding, which is no product; all 6.92e9 but those
        // and the norms, for so many sequences that every expert is chosen.
        let elements = |sequences| generation_step(&olmoe(), sequences)[Kind::FewRows];
        for (sequences, wanted) in [(1, 1.18e9), (1000, 6.82e9)] {
            let found = elements(sequences);
            assert!((found / wanted - 1.0).abs() < 0.01, "{found} is not {wanted}");
        }
        assert!(elements(1) < elements(8) && elements(8) < elements(32));
    }

    #[test]
    fn a_window_bounds_attention() {
        let mut config = olmoe();
        let whole = TokenWork::new(&config, 4096.0);
        config.heads.iter_mut().for_each(|h| h.window = Some(512));
        let windowed = TokenWork::new(&config, 4096.0);
        assert_eq!(windowed.layers.attention * 4.0, whole.layers.attention, "512 of 2048 positions on average");
        assert_eq!(windowed.layers.dense, whole.layers.dense);
    }
}
