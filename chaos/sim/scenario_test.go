package sim

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// scenario is a trap of the protocol: faults that lead into it, again and again
// during a run, and the planted bugs that take its guards away.
type scenario struct {
	trap    string
	shape   shape
	faults  []Fault // At counts from the beginning of each round
	planted []string
}

var (
	three = shape{hosts: 3, replicas: 3, local: true, flushes: 9, zeros: 10}
	apart = shape{hosts: 3, replicas: 3, flushes: 2, zeros: 10}
	rare  = shape{hosts: 3, replicas: 3, local: true, flushes: 0, zeros: 10}
	trims = shape{hosts: 3, replicas: 3, flushes: 9, zeros: 40}
	moves = shape{hosts: 4, replicas: 3, flushes: 25, zeros: 10, grace: time.Second}
	twins = shape{hosts: 3, replicas: 2, flushes: 2, zeros: 10}
	rots  = shape{hosts: 3, replicas: 3, flushes: 9, zeros: 10, rot: true, victim: 1}
)

var scenarios = []scenario{
	{"a writer dies with writes in flight", three, []Fault{{At: 20, Kind: KillHost, Host: 0, For: 900 * ms}, {At: 60, Kind: KillHost, Host: 1, For: 900 * ms}, {At: 100, Kind: KillHost, Host: 2, For: 900 * ms}}, []string{"no-reconcile", "older-wins"}},
	{"blocks only the dead writer's replica had", three, []Fault{{At: 10, Kind: SlowNet, For: 3000 * ms, Gate: 0, Host: 1}, {At: 20, Kind: Isolate, Host: 0, Gate: 1, For: 4000 * ms, Arg: 300}}, []string{"join-keeps-own", "join-newer-wins"}},
	{"a fenced writer that still reads", three, []Fault{{At: 20, Kind: Isolate, Host: 0, Gate: 1, For: 15000 * ms}, {At: 90, Kind: Isolate, Host: 1, Gate: 2, For: 15000 * ms}}, []string{"lease-ignored", "attach-does-not-wait", "confirm-reached-only"}},
	{"reads without metadata", apart, []Fault{{At: 10, Kind: LeaderFalls, For: 40000 * ms}, {At: 100, Kind: Reset, Host: 1, Gate: 0}, {At: 140, Kind: CutMeta, Gate: 0, For: 9000 * ms, Arg: 1}, {At: 150, Kind: Partition, Host: 0, Gate: 1, For: 9000 * ms}, {At: 150, Kind: Takeover, Gate: 1}}, []string{"confirm-reached-only"}},
	{"acknowledging before an exclusion is committed", three, []Fault{{At: 20, Kind: LeaderFalls, For: 2000 * ms}, {At: 21, Kind: KillStore, Host: 2, For: 3000 * ms}, {At: 24, Kind: KillGate, Host: 0, For: 2000 * ms}}, []string{"ack-before-exclusion", "ack-after-one"}},
	{"a joiner counts only when it has everything", apart, []Fault{{At: 10, Kind: KillStore, Host: 1, For: 400 * ms}, {At: 40, Kind: KillStore, Host: 2, For: 400 * ms}}, []string{"joiner-read", "join-source-behind"}},
	{"the disk of a store is lost and nobody notices", apart, []Fault{{At: 40, Kind: Amnesia, Host: 1, For: 1 * ms}, {At: 200, Kind: Amnesia, Host: 2, For: 1 * ms}}, []string{"incarnation-ignored", "amnesia-in-sync"}},
	{"an epoch is used only once it is kept", rare, []Fault{{At: 20, Kind: Takeover, Gate: 1}, {At: 21, Kind: PowerAll, For: 300 * ms}, {At: 40, Kind: Takeover, Gate: 2}}, []string{"epoch-not-kept", "seal-too-early"}},
	{"writes of a fenced writer arrive late", apart, []Fault{{At: 20, Kind: CutMeta, Gate: 0, For: 16000 * ms}, {At: 21, Kind: Takeover, Gate: 1}, {At: 130, Kind: CutMeta, Gate: 1, For: 16000 * ms}, {At: 131, Kind: Takeover, Gate: 2}}, []string{"no-seal"}},
	{"a connection's requests arrive after it was given up", apart, []Fault{{At: 10, Kind: DeafStore, Host: 1, Gate: 0, For: 1600 * ms}, {At: 14, Kind: Reset, Host: 2, Gate: 0}, {At: 15, Kind: Takeover, Gate: 0}}, nil},
	{"a late exclusion of a fenced writer", apart, []Fault{{At: 20, Kind: CutMeta, Gate: 0, For: 3000 * ms}, {At: 22, Kind: KillStore, Host: 2, For: 500 * ms}, {At: 23, Kind: Takeover, Gate: 1}}, []string{"no-epoch"}},
	{"a dropped tombstone", trims, []Fault{{At: 80, Kind: KillStore, Host: 1, For: 5 * ms}, {At: 150, Kind: KillStore, Host: 2, For: 5 * ms}}, []string{"tombstones-dropped"}},
	{"an in-sync member loses power before the floor", rare, []Fault{{At: 20, Kind: PowerHost, Host: 1, For: 1 * ms}, {At: 60, Kind: PowerHost, Host: 2, For: 1 * ms}, {At: 61, Kind: KillGate, Host: 0, For: 500 * ms}}, []string{"power-loss-ignored", "dirty-power-loss", "always-intact"}},
	{"only members that lost power are left", rare, []Fault{{At: 60, Kind: KillHost, Host: 0, For: 4000 * ms}, {At: 60, Kind: PowerHost, Host: 1, For: 1 * ms}, {At: 60, Kind: PowerHost, Host: 2, For: 1 * ms},
		{At: 160, Kind: KillHost, Host: 1, For: 4000 * ms}, {At: 160, Kind: PowerHost, Host: 2, For: 1 * ms}, {At: 160, Kind: PowerHost, Host: 0, For: 1 * ms}}, nil},
	{"every in-sync replica loses power under load", rare, []Fault{{At: 60, Kind: PowerHost, Host: 0, For: 1 * ms}, {At: 60, Kind: PowerHost, Host: 1, For: 1 * ms}, {At: 60, Kind: PowerHost, Host: 2, For: 1 * ms}}, []string{"attach-limit"}},
	{"members change under a flush", three, []Fault{{At: 20, Kind: HangDisk, Host: 1, For: 300 * ms}, {At: 20, Kind: KillHost, Host: 2, For: 1500 * ms}, {At: 20, Kind: Survivor, For: 800 * ms, Arg: 256},
		{At: 140, Kind: HangDisk, Host: 2, For: 300 * ms}, {At: 140, Kind: KillHost, Host: 0, For: 1500 * ms}, {At: 140, Kind: Survivor, For: 800 * ms, Arg: 256}}, []string{"flush-not-reissued"}},
	{"reading a write in flight", three, []Fault{{At: 20, Kind: HangDisk, Host: 1, For: 700 * ms}, {At: 24, Kind: KillHost, Host: 0, For: 700 * ms}}, []string{"read-in-flight", "read-before-write"}},
	{"writes in parts of a block", three, []Fault{{At: 20, Kind: SlowDisk, Host: 0, For: 900 * ms, Arg: 9}, {At: 60, Kind: KillGate, Host: 0, For: 100 * ms}}, []string{"merge-race"}},
	{"a failed sync ends the store", apart, []Fault{{At: 20, Kind: DiskError, Host: 1, For: 600 * ms}, {At: 70, Kind: DiskError, Host: 2, For: 600 * ms}}, []string{"flush-of-all-but-one"}},
	{"power fails behind a flush", three, []Fault{{At: 20, Kind: PowerFlush, For: 800 * ms}, {At: 120, Kind: Survivor, For: 800 * ms, Arg: 256}}, []string{"flush-without-flush", "sync-skipped", "sync-covers-later"}},
	{"the metadata leader falls with an unknown outcome", three, []Fault{{At: 20, Kind: KillStore, Host: 1, For: 600 * ms}, {At: 20, Kind: LeaderFalls, For: 200 * ms}, {At: 22, Kind: Echo, For: 3000 * ms}, {At: 40, Kind: LeaderFalls, For: 200 * ms}}, []string{"reapply", "new-leader-forgets"}},
	{"double attach", apart, []Fault{{At: 20, Kind: Takeover, Gate: 1}, {At: 22, Kind: Takeover, Gate: 2}, {At: 60, Kind: Takeover, Gate: 0}}, []string{"attach-without-exclusion"}},
	{"rot on one disk", rots, []Fault{{At: 20, Kind: BitFlip, Host: 1, Arg: 77 << 20}, {At: 40, Kind: Misdirected, Host: 1}, {At: 60, Kind: LostWrite, Host: 1}, {At: 140, Kind: KillStore, Host: 1, For: 5 * ms}}, []string{"unverified-reads", "torn-tail"}},
	{"rebuild racing writes", moves, []Fault{{At: 10, Kind: Drain, Host: 0, For: 100 * ms}, {At: 10, Kind: SlowNet, Host: 3, Gate: 1, For: 900 * ms, Arg: 5}, {At: 14, Kind: Survivor, For: 300 * ms, Arg: 256}, {At: 30, Kind: Drain, Host: 1, For: 100 * ms}, {At: 34, Kind: Survivor, For: 300 * ms, Arg: 512}},
		[]string{"fill-read"}},
	{"the store that gets a copy goes away", moves, []Fault{{At: 10, Kind: Drain, Host: 0, For: 200 * ms}, {At: 12, Kind: LeaderFalls, For: 800 * ms}, {At: 12, Kind: PowerHost, Host: 3, For: 1 * ms}, {At: 20, Kind: Drain, Host: 2, For: 200 * ms}, {At: 21, Kind: LeaderFalls, For: 400 * ms}, {At: 22, Kind: Reset, Host: 0, Gate: 1}},
		[]string{"fill-reconciled"}},
	{"a volume is handed over", three, []Fault{{At: 10, Kind: HandOver, Gate: 1}, {At: 10, Kind: LeaderFalls, For: 200 * ms}, {At: 11, Kind: Isolate, Host: 0, Gate: 1, For: 6000 * ms, Arg: 300},
		{At: 80, Kind: HandOver, Gate: 2}, {At: 80, Kind: LeaderFalls, For: 200 * ms}, {At: 81, Kind: Isolate, Host: 1, Gate: 2, For: 6000 * ms, Arg: 300},
		{At: 150, Kind: HandOver, Gate: 0}, {At: 150, Kind: LeaderFalls, For: 200 * ms}, {At: 151, Kind: Isolate, Host: 2, Gate: 0, For: 6000 * ms, Arg: 300}},
		nil},
	{"the last good copy fails while the other is dark", twins, []Fault{{At: 20, Kind: PowerHost, Host: 1, For: 2500 * ms}, {At: 23, Kind: KillStore, Host: 0, For: 900 * ms},
		{At: 80, Kind: PowerHost, Host: 2, For: 2500 * ms}, {At: 84, Kind: KillStore, Host: 1, For: 900 * ms},
		{At: 150, Kind: PowerHost, Host: 0, For: 2500 * ms}, {At: 155, Kind: KillStore, Host: 2, For: 900 * ms}}, []string{"exclude-unasked"}},
	{"a detach while a copy is missing", apart, []Fault{{At: 20, Kind: DiskError, Host: 1, For: 600 * ms}, {At: 22, Kind: Handover}, {At: 22, Kind: KillStore, Host: 2, For: 300 * ms}}, []string{"drain-without-joins"}},
}

// Each trap, with what leads into it, for several seeds.
func TestTraps(t *testing.T) {
	seeds := 8
	if testing.Short() {
		seeds = 2
	}
	for _, s := range scenarios {
		t.Run(s.trap, func(t *testing.T) {
			met := 0
			for seed := 1; seed <= seeds; seed++ {
				r := s.run(uint64(seed))
				if met += r.Stats.FaultCount(); r.Failure != nil {
					report(t, r)
				}
			}
			if met == 0 {
				t.Error("none of its faults happened")
			}
		})
	}
}

// run repeats the scenario's faults through a run.
func (s scenario) run(seed uint64) *Result {
	const steps, round = 1000, 250
	if s.shape.grace == 0 {
		s.shape.grace = time.Hour
	}
	cfg := Config{Seed: seed, Steps: steps, Faults: []Fault{}, shape: &s.shape}
	for at := 0; at < steps; at += round {
		for _, f := range s.faults {
			f.At += at
			f.Arg += uint64(at) << 21
			cfg.Faults = append(cfg.Faults, f)
		}
	}
	return Run(cfg)
}

// Every guard has its planted bug.
func TestTrapsNamePlantedBugs(t *testing.T) {
	for _, s := range scenarios {
		for _, p := range s.planted {
			if found, err := filepath.Glob(filepath.Join("planted", "[0-9][0-9]-"+p+".patch")); err != nil || len(found) != 1 {
				t.Errorf("%s: there are %d planted bugs called %s (%v)", s.trap, len(found), p, err)
			}
		}
	}
}

// TestTrapHunt is what TestPlanted runs first: the scenarios of one planted bug.
func TestTrapHunt(t *testing.T) {
	name := os.Getenv("CAIRN_SIM_TRAP")
	if name == "" {
		t.Skip("CAIRN_SIM_TRAP names a planted bug")
	}
	for seed := uint64(1); seed <= 40; seed++ {
		for _, s := range scenarios {
			for _, p := range s.planted {
				if p != name {
					continue
				}
				if r := s.run(seed); r.Failure != nil {
					fmt.Printf("found by trap %q, seed %d: %s: %s\n", s.trap, seed, r.Failure.Promise, r.Failure.Text)
					return
				}
			}
		}
	}
}
