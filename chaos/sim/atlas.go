package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// The fault atlas: what may break, and which combinations are fair.
//
// Everything below may happen at any time and on top of everything else, but
// for these, which no protocol survives or which would only show what is known:
//
//   - The loss of a disk (Amnesia) needs another in-sync member of every chunk
//     that kept its power and its disk, and no other fault of a store under
//     way, nor does one begin before that store is in sync again: P2 and P3
//     speak of all but one of the in-sync replicas.
//   - So does the loss of all disks but one (Survivor), right behind a completed
//     flush, when no change of members is under way: that one, if it is in sync
//     and lost no power since, has everything flushed, even if it loses its
//     power too (P2).
//   - Rot (BitFlip, LostWrite, Misdirected) happens on one store of a run, the
//     victim, and only where there are three replicas; the faults that take
//     another store out then come one at a time, when all are in sync: a block
//     whose only copy rots is lost. A victim that cannot be opened any more is
//     given an empty disk. So is one that is restarted and finds nothing wrong:
//     rot at the end of its log looks like a tail that was never promised, and
//     until a scrub compares replicas nothing tells the two apart.
//   - Power lost by all in-sync replicas of a chunk, even one after the other,
//     may take back what was not flushed (P3); the checker then expects the
//     last durable value or a later one, and one answer for ever.
//   - So may the power loss of one replica while the exclusion of all others is
//     being committed: the exclusion was asked for while that one served.
//   - A store's disk that failed a write or a sync is of no use until its
//     process has been started again.
//   - Clocks differ by up to 5 % and never step (CLOCK_BOOTTIME).
//   - Drain leaves as many hosts as the volume has replicas, or no chunk could be
//     allocated.
//   - Nobody repairs a clone that nobody uses: while one has blocks of its own no
//     disk is lost (Amnesia, Survivor), and there are none where disks rot.
//   - Only a snapshot that was read whole is cloned or rolled back to, so that it is
//     known what must be there.
//   - Copies leaves a volume at least two replicas, and where disks rot three.
//   - A store of an old copy of its disk comes with another incarnation, as the
//     format demands (Amnesia stands for both).
type Kind string

// The faults.
const (
	Reset       Kind = "reset"        // a connection breaks
	Partition   Kind = "partition"    // nothing passes between a gateway and a store
	MuteStore   Kind = "mute-store"   // what a store answers a gateway does not arrive
	DeafStore   Kind = "deaf-store"   // what a gateway sends a store does not arrive
	SlowNet     Kind = "slow-net"     // each way takes longer
	KillStore   Kind = "kill-store"   // kill -9, restarted after a while
	KillGate    Kind = "kill-gate"    //
	KillHost    Kind = "kill-host"    // store and gateway of one host
	KillAll     Kind = "kill-all"     // every process of every host
	PowerHost   Kind = "power-host"   // a host loses power
	PowerAll    Kind = "power-all"    // all do
	PowerFlush  Kind = "power-flush"  // all lose it at the moment a flush is answered
	Survivor    Kind = "survivor"     // then all in-sync disks but one are lost, and that one loses power
	PauseStore  Kind = "pause-store"  // SIGSTOP
	PauseGate   Kind = "pause-gate"   //
	SlowDisk    Kind = "slow-disk"    // every operation takes longer
	HangDisk    Kind = "hang-disk"    // nothing completes
	DiskError   Kind = "disk-error"   // one write or sync fails; the store is restarted later
	FullDisk    Kind = "full-disk"    // writes find no room
	LeaderFalls Kind = "leader-falls" // of metadata; another one after a while
	Isolate     Kind = "isolate"      // a host reaches nothing but itself; its volume is taken over
	CutMeta     Kind = "cut-meta"     // a gateway does not reach metadata
	Echo        Kind = "echo"         // metadata requests arrive twice for a while
	Takeover    Kind = "takeover"     // the volume is attached elsewhere, the old writer goes on
	Handover    Kind = "handover"     // it is detached, and attached elsewhere
	Amnesia     Kind = "amnesia"      // a store comes back empty
	BitFlip     Kind = "bit-flip"     // a bit changes on a disk
	LostWrite   Kind = "lost-write"   // the disk says OK and has not written
	Misdirected Kind = "misdirected"  // the disk has written elsewhere
	HandOver    Kind = "hand-over"    // the writer gives it to another host's, in one entry
	Drain       Kind = "drain"        // a host's chunks are to go elsewhere; later it takes some again
	Copies      Kind = "copies"       // the volume is to have more, or fewer, replicas
	Snapshot    Kind = "snapshot"     // somebody takes a snapshot, and looks at it
	Look        Kind = "look"         // somebody looks at a snapshot
	Remove      Kind = "remove"       // a snapshot is deleted
	Clone       Kind = "clone"        // somebody makes a clone of a snapshot, and uses it
	Use         Kind = "use"          // somebody uses a clone
	Drop        Kind = "drop"         // a clone is deleted
	Wish        Kind = "wish"         // placement wants copies elsewhere
	RollBack    Kind = "roll-back"    // the volume becomes what a snapshot shows
)

type weight struct {
	kind Kind
	n    int
}

// weights says how often each fault is drawn.
var weights = []weight{
	{Reset, 10}, {Partition, 5}, {MuteStore, 4}, {DeafStore, 4}, {SlowNet, 3}, {KillStore, 10}, {KillGate, 6}, {KillHost, 6}, {KillAll, 2},
	{PowerHost, 8}, {PowerAll, 3}, {PowerFlush, 4}, {Survivor, 4}, {PauseStore, 5}, {PauseGate, 5}, {SlowDisk, 3}, {HangDisk, 4}, {DiskError, 3}, {FullDisk, 2},
	{LeaderFalls, 6}, {Isolate, 6}, {CutMeta, 4}, {Echo, 2}, {Takeover, 6}, {Handover, 3}, {Amnesia, 3}, {BitFlip, 4}, {LostWrite, 2}, {Misdirected, 2},
	{Drain, 4}, {Copies, 3}, {HandOver, 4},
}

// operations says how often each operation on snapshots is drawn; how many of them
// there are does not depend on how many faults.
var operations = []weight{{Snapshot, 8}, {Look, 4}, {Remove, 5}, {RollBack, 2}, {Clone, 3}, {Use, 5}, {Drop, 2}, {Wish, 3}}

// Kinds lists every fault there is.
func Kinds() []Kind {
	var ks []Kind
	for _, x := range slices.Concat(weights, operations) {
		ks = append(ks, x.kind)
	}
	return ks
}

// Fault is one planned fault. What its numbers mean depends on Kind.
type Fault struct {
	At   int // it begins with this client operation
	Kind Kind
	Host int           // store or gateway, by place
	Gate int           // the other end of a connection
	For  time.Duration // until it is over
	Arg  uint64        // keep percent, disk offset, …
}

// String is the form a replay file has; ParseFault reads it.
func (f Fault) String() string {
	return fmt.Sprintf("%6d  %-12s host %d  gate %d  for %-8s arg %d", f.At, f.Kind, f.Host+1, f.Gate+1, f.For, f.Arg)
}

// ParseFault reads what String writes.
func ParseFault(s string) (Fault, error) {
	var f Fault
	var span string
	if _, err := fmt.Sscanf(s, "%d %s host %d gate %d for %s arg %d", &f.At, &f.Kind, &f.Host, &f.Gate, &span, &f.Arg); err != nil {
		return f, fmt.Errorf("fault %q: %w", s, err)
	}
	if !slices.Contains(Kinds(), f.Kind) {
		return f, fmt.Errorf("fault %q: there is no kind %q", s, f.Kind)
	}
	f.Host, f.Gate = f.Host-1, f.Gate-1
	var err error
	f.For, err = time.ParseDuration(span)
	return f, err
}

// shape is a cluster drawn from the seed.
type shape struct {
	hosts, replicas int
	local           bool // gateway and store of a host are one process
	rot             bool // one store's disk rots
	victim          int
	busy            int           // faults per 1,000 operations
	cuts            int           // operations on snapshots per 1,000 operations
	flushes         int           // of 100 operations
	zeros           int           // of 100 writes
	grace           time.Duration // a member out for longer has its chunks made elsewhere
}

func (s shape) String() string {
	out := fmt.Sprintf("%d hosts, %d replicas, %d faults per 1,000 operations", s.hosts, s.replicas, s.busy)
	if s.grace < time.Minute {
		out += fmt.Sprintf(", re-placed after %v", s.grace)
	}
	if s.cuts > 0 {
		out += fmt.Sprintf(", %d operations on snapshots", s.cuts)
	}
	if s.local {
		out += ", hosts are one process"
	}
	if s.rot {
		out += fmt.Sprintf(", store-%d rots", s.victim+1)
	}
	return out
}

func drawShape(r *rand.Rand) shape {
	s := shape{hosts: 3 + r.IntN(2), replicas: 3, local: r.IntN(2) == 0, busy: []int{2, 8, 20, 40}[r.IntN(4)]}
	switch r.IntN(8) {
	case 0:
		s.replicas = 2
	case 1:
		s.replicas = 1
	case 2:
		s.hosts, s.replicas = 5, 5
	}
	s.flushes = []int{0, 2, 9, 25}[r.IntN(4)]
	s.zeros = []int{2, 10, 40}[r.IntN(3)]
	s.rot = s.replicas >= 3 && r.IntN(5) == 0
	s.victim = r.IntN(s.hosts)
	s.grace = []time.Duration{time.Second, 3 * time.Second, time.Hour}[r.IntN(3)]
	if s.grace < time.Hour && r.IntN(2) == 0 {
		s.hosts++ // somewhere to go
	}
	s.cuts = []int{0, 4, 10, 20}[r.IntN(4)]
	return s
}

// drawFaults plans a run's faults.
func drawFaults(r *rand.Rand, s shape, steps int) []Fault {
	plan := []Fault{}
	for range steps * s.busy / 1000 {
		kind := drawKind(r, weights)
		at := 1 + r.IntN(steps)
		if len(plan) > 0 && r.IntN(3) == 0 { // misfortunes come together
			at = min(plan[len(plan)-1].At+r.IntN(3), steps)
		}
		f := Fault{At: at, Kind: kind, Host: r.IntN(s.hosts), Gate: r.IntN(s.hosts), Arg: r.Uint64N(1 << 40)}
		switch r.IntN(4) {
		case 0:
			f.For = time.Duration(1+r.IntN(50)) * time.Millisecond
		case 1, 2:
			f.For = time.Duration(50+r.IntN(1500)) * time.Millisecond
		default:
			f.For = time.Duration(1500+r.IntN(8000)) * time.Millisecond
		}
		if (kind == Amnesia || kind == PowerHost) && r.IntN(2) == 0 {
			f.For = time.Millisecond // nobody notices in time
		}
		if isRot(kind) {
			if !s.rot {
				continue
			}
			f.Host = s.victim
		}
		plan = append(plan, f)
	}
	for range steps * s.cuts / 1000 {
		plan = append(plan, Fault{At: 1 + r.IntN(steps), Kind: drawKind(r, operations), Host: r.IntN(s.hosts), Arg: r.Uint64N(1 << 40)})
	}
	slices.SortStableFunc(plan, func(a, b Fault) int { return a.At - b.At })
	return plan
}

func drawKind(r *rand.Rand, ws []weight) Kind {
	total := 0
	for _, x := range ws {
		total += x.n
	}
	k := r.IntN(total)
	for _, x := range ws {
		if k -= x.n; k < 0 {
			return x.kind
		}
	}
	return ""
}

func isRot(k Kind) bool { return k == BitFlip || k == LostWrite || k == Misdirected }

// takesOut reports whether a fault may keep a store from answering, or make it
// forget. What befalls a gateway befalls the store in its process.
func (s shape) takesOut(k Kind) bool {
	switch k {
	case KillGate, PauseGate:
		return s.local
	case Reset, SlowNet, LeaderFalls, CutMeta, Echo, Takeover, Handover, FullDisk, Drain, Copies, HandOver, Snapshot, Look, Remove, RollBack, Clone, Use, Drop, Wish:
		return false
	}
	return !isRot(k)
}
