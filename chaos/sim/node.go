package sim

import (
	"fmt"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/disk"
	"github.com/cairnstore/cairn/chunk/store"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const (
	segmentBlocks = 64
	diskSegments  = 28
	diskBytes     = (16 + diskSegments*segmentBlocks) * ids.BlockSize
	nodeStepEvery = 100 * time.Millisecond
	cluster       = "sim"
)

// node is one chunk server process with one store, on a host of its own.
type node struct {
	w     *world
	index int
	name  string // for people
	host  string
	id    ids.StoreID

	disk        *faultyDisk
	store       *store.Store // nil while down
	boot        int          // of the host's system; raised by a power loss
	life        int          // of the process
	served      []*conn      // connections it serves
	dark        bool         // its host has no power: nobody says so to its peers
	unheard     []*conn      // connections whose peers do not know yet that it lost power
	pausedUntil time.Duration
	failedUntil time.Duration // when it was started again after its disk last failed
	fullUntil   time.Duration // writes find no room
	lostAt      uint64        // logical time of the last power loss; 0: it holds all it accepted
	darkSince   time.Duration // when that was
	rots        bool          // its disk has rotted since the store was opened
	gone        bool          // its disk was lost, and it has not joined again
	formats     int           // lives of the identity given out
}

func newNode(w *world, i int) *node {
	n := &node{w: w, index: i, name: fmt.Sprintf("store-%d", i+1), host: fmt.Sprintf("host-%d", i+1), boot: 1}
	for b := range n.id {
		n.id[b] = byte(0x10*(i+1) + b)
	}
	n.disk = &faultyDisk{w: w, node: n, immediate: w.chance(2)}
	n.format()
	return n
}

// format gives the node an empty disk with the next incarnation.
func (n *node) format() {
	n.formats++
	if n.disk.mem == nil {
		n.disk.mem = mems.Get().(*disk.Mem)
	}
	n.disk.mem.Clear()
	n.disk.now = true
	err := store.Make(n.disk, store.Format{ID: n.id, Incarnation: ids.Incarnation(1000 * n.formats), Cluster: cluster,
		SegmentBytes: segmentBlocks * ids.BlockSize})
	n.disk.now = false
	if err != nil {
		n.w.violate("sim", "%s cannot be formatted: %v", n.name, err)
	}
}

func (n *node) up() bool { return n.store != nil }

// start opens the store and registers it, as a host process does: it serves
// before metadata knows it.
func (n *node) start() {
	if n.up() {
		return
	}
	n.life++
	n.disk.now = true
	s, err := store.Open(store.Config{Disk: n.disk, BootID: fmt.Sprintf("boot-%d-%d", n.index, n.boot), Cluster: cluster})
	n.disk.now = false
	if err != nil {
		n.w.note(n.name, "unreadable", func() string { return err.Error() })
		if !n.w.faults.rotten(n) {
			n.w.violate("P3", "%s cannot be opened again: %v", n.name, err)
			return
		}
		n.lose()
		n.start()
		return
	}
	if n.rots && s.Usage().Note == "" { // see the atlas: nothing tells it
		n.rots = false
		n.lose()
		n.start()
		return
	}
	n.store, n.dark, n.rots = s, false, false
	for _, c := range n.unheard { // whatever they send now is answered with a reset
		c.reset()
	}
	n.unheard = nil
	n.w.note(n.name, "start", func() string { return fmt.Sprintf("incarnation %d %s", s.Incarnation(), s.Usage().Note) }, uint64(s.Incarnation()))
	if note := s.Usage().Note; note != "" && !n.w.faults.rotten(n) {
		n.w.violate("P3", "%s finds damage nobody did: %s", n.name, note)
		return
	}
	n.register()
	n.steps(n.life)
	n.sweeps(n.life)
}

func (n *node) register() {
	st := &pb.Store{Id: n.id[:], Incarnation: uint64(n.store.Incarnation()), Host: n.host, CapacityBytes: 1 << 30}
	n.w.meta.agent(n.host).do(&pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: st}}}, func(_ *pb.Result, err error) {
		if err != nil {
			n.w.violate("P8", "%s cannot be registered: %v", n.name, err)
		}
	})
}

// steps drives the store's background work.
func (n *node) steps(life int) {
	n.w.after(nodeStepEvery, func() {
		if n.life != life || !n.up() {
			return
		}
		if n.pausedUntil <= n.w.now {
			n.store.Step(n.w.now)
		}
		n.steps(life)
	})
}

// stop ends the process, as kill -9 does; keep is what a power loss leaves.
func (n *node) stop(keep int) {
	n.life++
	n.store = nil
	n.pausedUntil, n.fullUntil = 0, 0
	n.disk.crash(keep)
	served := n.served
	n.served = nil
	for _, c := range served {
		c.serverDead, c.toServer = true, nil
		if keep < 100 {
			n.unheard = append(n.unheard, c)
		} else {
			c.reset()
		}
	}
	n.dark = n.dark || keep < 100
}

func (n *node) kill() {
	if n.up() {
		n.w.note(n.name, "kill", func() string { return "" })
		n.stop(100)
	}
}

// powerLoss takes the power: unsynced sectors stay with a chance of keep.
func (n *node) powerLoss(keep int) {
	n.w.note(n.name, "power loss", func() string { return fmt.Sprintf("keeps %d %%", keep) }, uint64(keep))
	n.stop(min(keep, 99))
	n.boot++
	n.lostAt, n.darkSince = n.w.tick(), n.w.now
	n.w.powerLost()
}

// lose takes the disk: an empty one comes in its place.
func (n *node) lose() {
	n.w.note(n.name, "amnesia", func() string { return "its disk is replaced by an empty one" })
	n.stop(99)
	n.format()
	n.boot++
	n.gone, n.rots, n.lostAt, n.darkSince = true, false, n.w.tick(), n.w.now
	n.w.powerLost()
}

// powerLost looks what may be gone.
func (w *world) powerLost() {
	w.check.powerLost()
	for _, c := range w.clones {
		c.lost()
	}
}

// joined: the member holds everything again. A lost disk's incarnation may
// be taken for in-sync until somebody notices; the new one is not the same.
func (n *node) joined(m *pb.Member) {
	n.lostAt = 0
	if n.up() && uint64(n.store.Incarnation()) == m.Incarnation {
		n.gone = false
	}
}

// submit gives a batch that has arrived to the store.
func (n *node) submit(c wire.Sink, reqs []*wire.Request) {
	var batch []*wire.Request
	for _, q := range reqs {
		switch {
		case q.Kind == wire.Ping:
			c.Replies([]*wire.Reply{{Kind: wire.Ping, ID: q.ID}})
		case n.fullUntil > n.w.now && (q.Kind == wire.Write || q.Kind == wire.Install && len(q.Data) > 0):
			c.Replies([]*wire.Reply{{Kind: q.Kind, ID: q.ID, Status: status.NoSpace, Detail: "no space (simulated)"}})
		default:
			batch = append(batch, q)
		}
	}
	if len(batch) > 0 {
		n.store.Submit(batch, c)
	}
}

// drop forgets a connection the server has closed.
func (n *node) drop(c *conn) {
	for i, o := range n.served {
		if o == c {
			n.served = append(n.served[:i], n.served[i+1:]...)
			return
		}
	}
}

// ask puts one question to the store for a checker, over the connection of the
// attachment that sealed it last: another one's would not be answered. The
// answer must not need the disk.
func (n *node) ask(a *attachment, q *wire.Request) *wire.Reply {
	var got replySink
	for _, p := range a.peers {
		switch {
		case p.link != nil && p.link.n == n && p.link.conn != nil:
			c := p.link.conn
			c.tap = &got
			n.store.Submit([]*wire.Request{q}, c)
			c.tap = nil
		case p.local != nil && p.local.n == n:
			p.local.tap = &got
			n.store.Submit([]*wire.Request{q}, p.local)
			p.local.tap = nil
		}
	}
	if len(got) != 1 {
		return &wire.Reply{Status: status.Internal, Detail: "the store has not answered"}
	}
	return got[0]
}

// replySink keeps replies.
type replySink []*wire.Reply

// Replies implements wire.Sink.
func (r *replySink) Replies(rs []*wire.Reply) { *r = append(*r, rs...) }

// digest is the checksum of every byte on the disk, for the state hash.
func (n *node) digest() uint64 {
	sum := uint64(0)
	n.disk.mem.Written(func(sector int64, b []byte) {
		sum = (sum ^ uint64(sector)<<32 ^ uint64(wire.Checksum(b))) * 0x9e3779b97f4a7c15
	})
	return sum
}

// mems keeps the disks of runs that are over: a new one is megabytes to clear.
var mems = sync.Pool{New: func() any { return disk.NewMem(diskBytes) }}

func (n *node) picture() string {
	if !n.up() {
		return n.name + " down"
	}
	u := n.store.Usage()
	return fmt.Sprintf("%s up, incarnation %d, %d of %d KiB live, %s %s, paused until %v, disk hung until %v, pending %d", n.name, n.store.Incarnation(),
		u.LiveBytes>>10, u.CapacityBytes>>10, u.State, u.Note, n.pausedUntil, n.disk.hungUntil, len(n.disk.pending))
}
