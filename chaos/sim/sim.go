// Package sim runs a whole cairn cluster on one goroutine in virtual time: one
// event queue, one seed.
//
// Duty: it drives the production cores — chunk/volume's engine, chunk/store on
// a crashable disk, meta/state's machine, the leader's lease table, the placer
// — breaks everything around them that may break (atlas.go says what, and which
// combinations are fair), checks the promises P1 to P8 after every step, heals
// the cluster and checks that it converges. Floor: F5. It has no second
// implementation of anything it tests, opens no socket and reads no clock; real
// processes are chaos/cluster's.
//
// # Who stands for what
//
//	disk.go      a disk: chunk/disk.Mem behind latencies, hangs, errors, rot
//	node.go      a chunk server process: connections and its store
//	link.go      a connection: ordered, cut at any request, stalled one way
//	gateway.go   the gateway shell: what chunk/gateway does, in virtual time
//	meta.go      the metadata service: one log, leaders that come and go
//	sweep.go     copies that have moved away are dropped
//	session.go   its client: numbers, retries, unknown outcomes
//	control.go   the operator: somebody has the volume attached, always
//	load.go      the guests: operations with values never used again
//	register.go  P1, P2, P3: each block is a register
//	check.go     the other promises, and convergence
//	atlas.go     the faults
//	inject.go    their doing and undoing
//
// The same Config gives the same Result.Hash on every machine and at every
// time; a test holds that.
package sim

import (
	"fmt"
	"time"
)

// Config says what to run.
type Config struct {
	Seed   uint64
	Steps  int     // client operations; 0: 2,000
	Faults []Fault // nil: drawn from the seed; empty: none
	Trace  bool    // keep what happens in Result.Trace
	shape  *shape  // nil: drawn from the seed
	unfair bool    // do faults the atlas forbids, too: a run that must fail
}

// Result is how a run went.
type Result struct {
	Config  Config
	Shape   string  // of the cluster
	Faults  []Fault // those that were planned
	Hash    uint64
	Stats   Stats
	Failure *Failure // nil: every promise was kept
	Trace   []Line
}

// Failure is a broken promise.
type Failure struct {
	Promise string // P1 to P8, or "converge"
	At      time.Duration
	Text    string
}

// Stats counts what a run did.
type Stats struct {
	Events                                uint64
	Begun                                 int // client operations
	Ops                                   int // client operations answered OK
	Unknown                               int // unanswered, or answered with the end of the session
	Refused                               int // answered with an error that is allowed
	Confirmed                             int // reads answered OK without a lease
	Attaches                              int
	Moves                                 int // copies of chunks that were made on another store and counted
	Shakes                                int // power losses that may take back what was not flushed
	Snapshots, Deleted, Rollbacks, Merged int
	Clones, Flat, CloneOps                int // clones made; made flat; operations on them answered OK
	Shown                                 int // answers of snapshots
	Virtual                               time.Duration
	Faults                                map[Kind]int
	Pairs                                 map[[2]Kind]int // a fault that began while another was not over
}

// Run runs one seed.
func Run(cfg Config) *Result {
	if cfg.Steps == 0 {
		cfg.Steps = 2000
	}
	w := newWorld(cfg)
	w.play()
	w.stats.Virtual, w.stats.Begun = w.now, w.load.begun
	r := &Result{Config: cfg, Shape: w.shape.String(), Faults: w.faults.plan, Hash: w.hash, Stats: w.stats, Failure: w.failed, Trace: w.traces}
	for _, n := range w.nodes {
		mems.Put(n.disk.mem)
	}
	return r
}

// healWithin bounds, in virtual time, how long a healed cluster may take until
// every operation is answered and every member in sync.
const healWithin = 90 * time.Second

// play is a run: load under faults, healing, the last power cut.
func (w *world) play() {
	w.boot()
	w.load.start()
	if !w.runUntil(time.Hour, w.load.over) {
		w.violate("P7", "the load is not over after %v of virtual time: %d of %d operations begun; %s", w.now, w.load.begun, w.cfg.Steps, w.picture())
		return
	}
	w.faults.heal()
	for _, n := range w.nodes {
		w.boss.drain(n, false)
	}
	w.converge("healed")
	w.faults.over = true
	w.check.allRead()
	w.check.equal()
	w.check.allShown()
	w.clonesRead()
	w.lastCut()
	w.finish()
}

// converge waits until everybody is well again.
func (w *world) converge(when string) {
	if w.failed != nil {
		return
	}
	w.load.reset()
	if !w.runUntil(w.now+healWithin, w.well) {
		w.violate("converge", "%s, and after %v the cluster is not well: %s", when, healWithin, w.picture())
	}
}

// lastCut takes the power from everything right after a flush, and reads all
// blocks again: P2 in one go.
func (w *world) lastCut() {
	if w.failed != nil {
		return
	}
	if !w.load.flushed() {
		return
	}
	for _, n := range w.nodes {
		n.powerLoss(w.rng.IntN(101))
	}
	for _, g := range w.gates {
		g.kill()
	}
	for _, n := range w.nodes {
		n.start()
	}
	for _, g := range w.gates {
		g.start()
	}
	w.converge("after the last power cut")
	w.check.allRead()
	w.check.equal()
	w.check.allShown()
	w.clonesRead()
}

// finish enters the final state into the hash.
func (w *world) finish() {
	if w.failed == nil {
		w.check.followers()
	}
	w.mix(w.meta.hash())
	for _, n := range w.nodes {
		w.mix(n.digest())
	}
}

// well reports whether the volume serves, every member is in sync, nothing is
// unanswered, and no process is yet to end because its disk failed.
func (w *world) well() bool {
	if w.now <= w.faults.failedUntil {
		return false
	}
	for _, g := range w.gates {
		if g.attaching { // the volume is about to move
			return false
		}
	}
	a := w.boss.serving()
	return a != nil && a.allInSync() && w.load.idle() && w.meta.idle() && w.settled(a)
}

// picture tells where things stand, for a failure.
func (w *world) picture() string {
	out := w.meta.picture()
	for _, n := range w.nodes {
		out += "\n  " + n.picture()
	}
	for _, g := range w.gates {
		out += "\n  " + g.picture()
	}
	return out + fmt.Sprintf("\n  load: %d begun, %d outstanding", w.load.begun, w.load.outstanding())
}

// FaultCount is how many faults happened.
func (s *Stats) FaultCount() int {
	n := 0
	for _, k := range s.Faults {
		n += k
	}
	return n
}

// canCare reports whether what there is to repair could be: no host is drained,
// so that each chunk finds its place.
func (w *world) canCare() bool {
	return int(w.meta.volume().GetReplicas()) <= len(w.nodes)
}

// settled reports whether nothing is being done with snapshots. A block that rots
// keeps its layer from being merged until it is repaired.
func (w *world) settled(a *attachment) bool {
	for _, g := range w.gates {
		if len(g.views)+len(g.sides) > 0 {
			return false
		}
	}
	return (w.shape.rot || !a.e.Info().Merging) && !w.boss.rolling && !w.boss.busy()
}
