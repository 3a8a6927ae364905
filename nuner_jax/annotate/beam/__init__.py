"""The stages select, align and build on Apache Beam, for corpora that one machine cannot read."""
