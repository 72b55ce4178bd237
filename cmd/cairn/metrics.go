package main

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/netplane/link"
)

// Every daemon serves /metrics for Prometheus and /healthz where its
// configuration says so. Values are read from the parts when they are scraped:
// nothing is counted twice, and the data path does nothing for it. What each
// metric means is in its help text; docs/samples has alerts and a dashboard.

// metrics is a running HTTP server.
type metrics struct{ srv *http.Server }

// collect is a collector made of one function.
type collect func(emit func(m prometheus.Metric))

// Describe implements prometheus.Collector: what it gives depends on what there is.
func (collect) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collect) Collect(ch chan<- prometheus.Metric) {
	c(func(m prometheus.Metric) { ch <- m })
}

func serveMetrics(addr string, c collect, log *slog.Logger) (*metrics, error) {
	l, err := listenPatiently(link.Config{Addr: addr})
	if err != nil {
		return nil, err
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	m := &metrics{&http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}}
	go func() {
		if err := m.srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("metrics are not served any more", "err", err)
		}
	}()
	return m, nil
}

func (m *metrics) close() error {
	if m == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if err := m.srv.Shutdown(ctx); err != nil {
		return m.srv.Close() // a scrape that does not end
	}
	return nil
}

// family is one metric with its label names.
type family struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func gauge(name, help string, labels ...string) family {
	return family{prometheus.NewDesc("cairn_"+name, help, labels, nil), prometheus.GaugeValue}
}

func counter(name, help string, labels ...string) family {
	return family{prometheus.NewDesc("cairn_"+name, help, labels, nil), prometheus.CounterValue}
}

func (f family) of(v float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(f.desc, f.kind, v, labels...)
}

func yes(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var (
	metaLeader   = gauge("meta_leader", "1 on the metadata node that leads.")
	metaTerm     = gauge("meta_term", "Raft's term.")
	metaApplied  = counter("meta_applied_index", "Last command applied.")
	metaLast     = gauge("meta_last_index", "End of the log, committed or not.")
	metaVoter    = gauge("meta_voter", "1 on a node that votes.")
	metaFree     = gauge("meta_disk_free_bytes", "Free on the disk of the metadata; below 64 MiB what is new is refused.")
	metaCommands = counter("meta_commands_total", "Commands asked of this node, refused ones too.")
	metaRefused  = counter("meta_commands_refused_total", "Commands that were not done.")
	metaQueries  = counter("meta_queries_total", "Reads asked of this node.")
	metaRenewals = counter("meta_renewals_total", "Heartbeats and lease renewals asked of this node.")
	metaWatchers = gauge("meta_watchers", "Streams of changes open on this node.")
	metaAudit    = gauge("meta_audit_hash", "Low 52 bits of the state hash at the last audit; the same on all nodes at one index.")
	metaAuditAt  = gauge("meta_audit_index", "The last audit's index.")

	clusterVolumes  = gauge("volumes", "Volumes by state; from the leader only.", "state")
	clusterHosts    = gauge("hosts", "Hosts that are up or down; from the leader only.", "state")
	clusterStores   = gauge("stores", "Stores in service, well or not; from the leader only.", "state")
	clusterUsed     = gauge("pool_used_bytes", "Used on all stores in service; from the leader only.")
	clusterCapacity = gauge("pool_capacity_bytes", "Capacity of the stores in service; from the leader only.")
	clusterFill     = gauge("pool_fill_bytes_per_second", "How fast the pool fills, over the last half hour; below 0: it empties; from the leader only.")
	clusterToFull   = gauge("pool_full_in_seconds", "When the pool is full at that rate; +Inf: it does not fill; from the leader only.")
	clusterLogical  = gauge("pool_logical_bytes", "Sizes of all volumes; from the leader only.")
	clusterPlaced   = gauge("pool_placed_bytes", "Chunks with all their copies; from the leader only.")
)

func metaMetrics(m *metad) collect {
	return func(emit func(prometheus.Metric)) {
		srv := m.server()
		n, c := srv.NodeInfo(), srv.Counts()
		for f, v := range map[family]float64{
			metaLeader: yes(n.Leader), metaTerm: float64(n.Term), metaApplied: float64(n.Applied), metaLast: float64(n.LastIndex), metaVoter: yes(n.Role == "voter"),
			metaFree: float64(n.FreeBytes), metaCommands: float64(c.Commands), metaRefused: float64(c.Refused), metaQueries: float64(c.Queries),
			metaRenewals: float64(c.Renewals), metaWatchers: float64(c.Watchers), metaAudit: float64(n.AuditHash & (1<<52 - 1)), metaAuditAt: float64(n.AuditIndex)} {
			emit(f.of(v))
		}
		k := srv.Census()
		if k == nil {
			return
		}
		for state, v := range map[string]int{"there": k.Volumes, "deleted": k.Deleted, "attached": k.Attached, "degraded": k.Degraded, "last_copy": k.LastCopy} {
			emit(clusterVolumes.of(float64(v), state))
		}
		emit(clusterHosts.of(float64(k.HostsUp), "up"))
		emit(clusterHosts.of(float64(k.HostsDown), "down"))
		emit(clusterStores.of(float64(k.StoresOK), "ok"))
		emit(clusterStores.of(float64(k.StoresBad), "bad"))
		emit(clusterUsed.of(float64(k.UsedBytes)))
		emit(clusterCapacity.of(float64(k.CapacityBytes)))
		emit(clusterFill.of(k.FillBytesPerSecond))
		left := k.SecondsToFull()
		if left < 0 {
			left = math.Inf(1)
		}
		emit(clusterToFull.of(left))
		emit(clusterLogical.of(float64(k.Pool.LogicalBytes)))
		emit(clusterPlaced.of(float64(k.Pool.PlacedBytes)))
	}
}

var (
	storeCapacity = gauge("store_capacity_bytes", "What a store takes.", "store")
	storeUsed     = gauge("store_used_bytes", "Segments in use.", "store")
	storeLive     = gauge("store_live_bytes", "Blocks that can be read.", "store")
	storeOK       = gauge("store_ok", "1 when a store is well.", "store")
	storeFull     = gauge("store_utilisation", "Live bytes over capacity.", "store")
	storeLog      = counter("store_log_bytes_total", "Written to the log since the opening: data, copies of compaction, records.", "store")
	storeCopied   = counter("store_copied_bytes_total", "Moved by compaction since the opening.", "store")
	storeAmp      = gauge("store_write_amplification", "Log written since the opening over what of it was no copy of compaction.", "store")
	storeDebt     = gauge("store_compaction_debt_bytes", "Dead in closed segments: what compaction could give back.", "store")
	storeFree     = gauge("store_free_segments", "Segments that may be opened.", "store")
	storeSums     = counter("store_checksum_errors_total", "Blocks read that did not match their checksum, since the opening.", "store")
	storeBad      = gauge("store_bad_blocks", "Blocks known not to be readable now.", "store")
	storeScrubAge = gauge("store_scrub_age_seconds", "Since the last whole verification, or since they are counted.", "store")
	storeIndex    = gauge("store_index_bytes", "Index pages in memory.", "store")
	storeMisses   = counter("store_index_misses_total", "Index pages fetched, since the opening.", "store")
	storeLag      = gauge("store_checkpoint_lag_bytes", "Log behind the last checkpoint begun.", "store")

	volServing  = gauge("volume_serving", "1 when a volume attached here serves.", "volume")
	volInSync   = gauge("volume_replicas_in_sync", "Stores of a volume attached here that are in sync.", "volume")
	volMembers  = gauge("volume_replicas", "Stores of a volume attached here.", "volume")
	volExcluded = counter("volume_exclusions_total", "Stores excluded since the attach.", "volume")
	volJoined   = counter("volume_joins_total", "Stores that caught up since the attach.", "volume")
	volRepaired = counter("volume_repaired_blocks_total", "Bad blocks written anew from a good copy since the attach.", "volume")
	volStale    = counter("volume_stale_blocks_total", "Blocks a copy had lost without a trace, found by comparing copies since the attach.", "volume")
	volStall    = gauge("volume_max_write_stall_seconds", "The longest a write has waited since the attach.", "volume")
	nbdOps      = counter("nbd_requests_total", "NBD requests answered.", "volume", "op")
	nbdFailed   = counter("nbd_requests_failed_total", "NBD requests answered with an error.", "volume", "op")
	nbdBytes    = counter("nbd_bytes_total", "Bytes of NBD requests.", "volume", "op")
	nbdFlight   = gauge("nbd_in_flight", "NBD requests being worked on.", "volume")
	nbdConns    = gauge("nbd_connections", "NBD connections.", "volume")
	nbdLatency  = prometheus.NewDesc("cairn_nbd_latency_seconds", "From a request's last byte to its answer.", []string{"volume", "op"}, nil)
)

func hostMetrics(h *hostd) collect {
	return func(emit func(prometheus.Metric)) {
		for _, s := range h.stores {
			u, id := s.Usage(), s.ID().Short()
			emit(storeCapacity.of(float64(u.CapacityBytes), id))
			emit(storeUsed.of(float64(u.UsedBytes), id))
			emit(storeLive.of(float64(u.LiveBytes), id))
			emit(storeOK.of(yes(u.State == "ok"), id))
			for f, v := range map[family]float64{
				storeFull: float64(u.LiveBytes) / float64(u.CapacityBytes), storeLog: float64(u.LogBytes), storeCopied: float64(u.CopiedBytes), storeAmp: u.WriteAmplification(),
				storeDebt: float64(u.DebtBytes), storeFree: float64(u.FreeSegments), storeSums: float64(u.ChecksumErrors), storeBad: float64(len(s.BadBlocks())),
				storeScrubAge: s.scrubAge().Seconds(), storeIndex: float64(u.IndexBytes), storeMisses: float64(u.IndexMisses), storeLag: float64(u.CheckpointLag)} {
				emit(f.of(v, id))
			}
		}
		for _, v := range h.gw.Volumes() {
			name, in := v.Name(), v.Info()
			good := 0
			for _, r := range in.Replicas {
				if r.State == "in-sync" {
					good++
				}
			}
			emit(volServing.of(yes(in.State == volume.Serving), name))
			emit(volInSync.of(float64(good), name))
			emit(volMembers.of(float64(len(in.Replicas)), name))
			emit(volExcluded.of(float64(in.Stats.Excluded), name))
			emit(volJoined.of(float64(in.Stats.Joined), name))
			emit(volRepaired.of(float64(in.Stats.Repaired), name))
			emit(volStale.of(float64(in.Stats.Stale), name))
			emit(volStall.of(in.Stats.MaxWriteStall.Seconds(), name))
			h.nbdMetrics(emit, name)
		}
	}
}

// nbdMetrics gives an export's counts; a histogram's buckets add up.
func (h *hostd) nbdMetrics(emit func(prometheus.Metric), name string) {
	x := h.nbd.Stats(name)
	emit(nbdFlight.of(float64(x.InFlight), name))
	emit(nbdConns.of(float64(x.Connections), name))
	for class := range nbd.ClassCount {
		o := &x.Ops[class]
		if o.Done == 0 {
			continue
		}
		op := class.String()
		emit(nbdOps.of(float64(o.Done), name, op))
		emit(nbdFailed.of(float64(o.Failed), name, op))
		emit(nbdBytes.of(float64(o.Bytes), name, op))
		buckets, sum := map[float64]uint64{}, uint64(0)
		for i, n := range o.Latency.Counts {
			if sum += n; i%4 == 3 { // one bucket for each power of two, always the same ones
				buckets[float64(nbd.BucketMaxUs(i))/1e6] = sum
			}
		}
		emit(prometheus.MustNewConstHistogram(nbdLatency, sum, float64(o.Latency.SumUs)/1e6, buckets, name, op))
	}
}
