//! Which decoder layers have routed experts.

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Routed experts.
    Moe,
    /// One SwiGLU of this width.
    Dense(usize),
}

/// The MoE layers of a model among its decoder layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeLayers {
    /// Numbers of the decoder layers with routed experts, ascending.
    pub layers: Vec<usize>,
    /// Number of all decoder layers, dense ones included.
    pub depth: usize,
}

impl MoeLayers {
    /// The MoE layers among these decoder layers.
    pub fn of(kinds: &[LayerKind]) -> Self {
        let layers = (0..kinds.len()).filter(|&l| kinds[l] == LayerKind::Moe).collect();
        Self { layers, depth: kinds.len() }
    }

    /// Number of MoE layers.
    pub fn count(&self) -> usize {
        self.layers.len()
    }

    /// Indices of all MoE layers: 0, 1, ...
    pub fn indices(&self) -> Vec<usize> {
        (0..self.count()).collect()
    }

    /// The index of a decoder layer among the MoE layers. Panics for a dense layer.
    pub fn index_of(&self, layer: usize) -> usize {
        self.layers.binary_search(&layer).expect("a layer with routed experts")
    }
}
