BEGIN TRANSACTION;
CREATE TABLE nsa_alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT nsa_alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "nsa_alembic_version" VALUES('0004');
CREATE TABLE nsa_designs (
	id INTEGER NOT NULL, 
	fingerprint_id INTEGER NOT NULL, 
	group_size INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	study_digest VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	created VARCHAR NOT NULL, 
	tool_version VARCHAR NOT NULL, 
	study TEXT NOT NULL, 
	nsa TEXT NOT NULL, 
	parts TEXT NOT NULL, 
	latency_us DOUBLE NOT NULL, 
	mass_kept DOUBLE NOT NULL, 
	mass_kept_p10 DOUBLE NOT NULL, 
	output_error DOUBLE NOT NULL, 
	locality DOUBLE, 
	CONSTRAINT pk_nsa_designs PRIMARY KEY (id), 
	CONSTRAINT fk_nsa_designs_fingerprint_id FOREIGN KEY(fingerprint_id) REFERENCES nsa_fingerprints (id), 
	CONSTRAINT uq_nsa_designs_digest UNIQUE (digest)
);
INSERT INTO "nsa_designs" VALUES(1,1,16,'f8a5930d9e7d67257535','d77af029de0c48c64041','measured','2025-03-01T10:00:00.000001+00:00','0.1.0','{"what":"a study"}','{"window_size":512}','{"slc_attn_fwd":30.0}',30.0,0.9,0.8,0.1,NULL);
CREATE TABLE nsa_fingerprints (
	id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	gpu VARCHAR NOT NULL, 
	capability VARCHAR NOT NULL, 
	facts TEXT NOT NULL, 
	CONSTRAINT pk_nsa_fingerprints PRIMARY KEY (id), 
	CONSTRAINT uq_nsa_fingerprints_digest UNIQUE (digest)
);
INSERT INTO "nsa_fingerprints" VALUES(1,'eabb4a80f03504385fd7','NVIDIA H100','9.0','{"capability":"9.0","driver":"570","gpu":"NVIDIA H100","torch":"2.11"}');
CREATE TABLE nsa_problems (
	id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	family VARCHAR NOT NULL, 
	problem_key VARCHAR NOT NULL, 
	problem TEXT NOT NULL, 
	CONSTRAINT pk_nsa_problems PRIMARY KEY (id), 
	CONSTRAINT uq_nsa_problems_digest UNIQUE (digest)
);
INSERT INTO "nsa_problems" VALUES(1,'6c53315fcb1db221fd86','win_attn_fwd','{"seq_k":8192}','{"batch":1,"d_qk":128,"d_v":128,"dtype":"bfloat16","layout":"batched","locality":0.8,"nsa":{"compress_block_size":32,"compress_stride":16,"num_initial":1,"num_local":2,"num_selected":16,"select_block_size":64,"window_size":512},"num_kv_heads":4,"num_q_heads":64,"phi_hidden":128,"seq_k":8192,"seq_q":8192}');
CREATE TABLE nsa_shipped_files (
	name VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	CONSTRAINT pk_nsa_shipped_files PRIMARY KEY (name)
);
CREATE TABLE nsa_trials (
	id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	fingerprint_id INTEGER NOT NULL, 
	problem_id INTEGER NOT NULL, 
	variant_id INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	kind VARCHAR NOT NULL, 
	provider VARCHAR NOT NULL, 
	stage VARCHAR NOT NULL, 
	created VARCHAR NOT NULL, 
	tool_version VARCHAR NOT NULL, 
	reason TEXT NOT NULL, 
	samples_us TEXT NOT NULL, 
	resources TEXT, 
	median_us DOUBLE, 
	p20_us DOUBLE, 
	p80_us DOUBLE, 
	max_error DOUBLE, 
	baseline_error DOUBLE, 
	predicted_us DOUBLE, policy VARCHAR DEFAULT 'eager-cold' NOT NULL, environment TEXT, 
	CONSTRAINT pk_nsa_trials PRIMARY KEY (id), 
	CONSTRAINT fk_nsa_trials_fingerprint_id FOREIGN KEY(fingerprint_id) REFERENCES nsa_fingerprints (id), 
	CONSTRAINT fk_nsa_trials_problem_id FOREIGN KEY(problem_id) REFERENCES nsa_problems (id), 
	CONSTRAINT fk_nsa_trials_variant_id FOREIGN KEY(variant_id) REFERENCES nsa_variants (id), 
	CONSTRAINT uq_nsa_trials_digest UNIQUE (digest)
);
INSERT INTO "nsa_trials" VALUES(1,'f6cabff81268724e4dec',1,1,1,'ok','measured','template','final','2025-03-01T10:00:00.000001+00:00','0.1.0','','[10.0,11.0,12.0]','{"registers":168}',11.0,10.4,11.6,NULL,NULL,NULL,'graph-warm','{"sm_mhz":1980}');
INSERT INTO "nsa_trials" VALUES(2,'5b26eea586d90750b471',1,1,1,'crash','measured','template','search','2025-03-01T10:00:00.000001+00:00','0.1.0','it''s gone','[]',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'eager-cold',NULL);
CREATE TABLE nsa_variants (
	id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	family VARCHAR NOT NULL, 
	template_digest VARCHAR NOT NULL, 
	config TEXT NOT NULL, 
	CONSTRAINT pk_nsa_variants PRIMARY KEY (id), 
	CONSTRAINT uq_nsa_variants_digest UNIQUE (digest)
);
INSERT INTO "nsa_variants" VALUES(1,'6acbe26638b867eb4f1c','win_attn_fwd','t1','{"BLOCK_N":64,"use_tma":true}');
CREATE TABLE nsa_winners (
	id INTEGER NOT NULL, 
	digest VARCHAR NOT NULL, 
	fingerprint_id INTEGER NOT NULL, 
	problem_id INTEGER NOT NULL, 
	variant_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	median_us DOUBLE NOT NULL, 
	p20_us DOUBLE NOT NULL, 
	p80_us DOUBLE NOT NULL, 
	samples_us TEXT NOT NULL, 
	default_config TEXT, 
	default_median_us DOUBLE, 
	library_median_us DOUBLE, 
	library VARCHAR NOT NULL, 
	created VARCHAR NOT NULL, 
	tool_version VARCHAR NOT NULL, 
	source VARCHAR NOT NULL, 
	origin VARCHAR NOT NULL, policy VARCHAR DEFAULT 'eager-cold' NOT NULL, verdict VARCHAR DEFAULT 'raced' NOT NULL, rivals TEXT DEFAULT '[]' NOT NULL, resources TEXT, 
	CONSTRAINT pk_nsa_winners PRIMARY KEY (id), 
	CONSTRAINT fk_nsa_winners_fingerprint_id FOREIGN KEY(fingerprint_id) REFERENCES nsa_fingerprints (id), 
	CONSTRAINT fk_nsa_winners_problem_id FOREIGN KEY(problem_id) REFERENCES nsa_problems (id), 
	CONSTRAINT fk_nsa_winners_variant_id FOREIGN KEY(variant_id) REFERENCES nsa_variants (id), 
	CONSTRAINT fk_nsa_winners_trial_id FOREIGN KEY(trial_id) REFERENCES nsa_trials (id), 
	CONSTRAINT uq_nsa_winners_digest UNIQUE (digest)
);
INSERT INTO "nsa_winners" VALUES(1,'1409384854bb1e0167db',1,1,1,1,11.0,10.4,11.6,'[10.0,11.0,12.0]','{"BLOCK_N":32,"use_tma":false}',15.0,20.0,'flex_attention','2025-03-01T10:00:00.000001+00:00','0.1.0','local','','graph-warm','confirmed','[{"blocks":60,"config":{"BLOCK_N":32,"use_tma":true},"high":0.009,"log_ratio":0.004,"low":-0.002,"tied":true}]','{"registers":168}');
CREATE INDEX ix_nsa_fingerprints_gpu ON nsa_fingerprints (gpu);
CREATE INDEX ix_nsa_fingerprints_capability ON nsa_fingerprints (capability);
CREATE INDEX ix_nsa_problems_family_problem_key ON nsa_problems (family, problem_key);
CREATE INDEX ix_nsa_trials_variant_id ON nsa_trials (variant_id);
CREATE INDEX ix_nsa_designs_study_digest_fingerprint_id ON nsa_designs (study_digest, fingerprint_id);
CREATE INDEX ix_nsa_trials_problem_id_fingerprint_id_kind_status_created ON nsa_trials (problem_id, fingerprint_id, kind, status, created);
CREATE INDEX ix_nsa_trials_kind_created_status_fingerprint_id_problem_id ON nsa_trials (kind, created, status, fingerprint_id, problem_id);
CREATE INDEX ix_nsa_trials_final ON nsa_trials (problem_id, fingerprint_id) WHERE stage = 'final';
CREATE INDEX ix_nsa_winners_by_problem ON nsa_winners (problem_id, fingerprint_id, policy, created, variant_id);
CREATE INDEX ix_nsa_winners_by_machine ON nsa_winners (fingerprint_id, problem_id, policy, created, variant_id);
COMMIT;
