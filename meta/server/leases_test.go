package server

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// world is a state machine, a leader with its lease table and three hosts whose
// gateways obey their two rules. Time is a number; the test checks promise P4
// for reads: when an attach returns, nobody can serve reads of an older epoch.
type world struct {
	t     *rapid.T
	kv    *state.Mem
	seq   map[string]uint64 // last number per client session
	now   time.Duration
	table *leases
	hosts [3]*gatewayModel
	next  int // session numbers

	// waiting is an attach that has been committed and not answered.
	waiting []*waitingAttach
}

type waitingAttach struct {
	host   int
	sess   string
	volume *pb.Volume // as attached
	prev   *pb.Volume
	gone   bool
	cmd    *pb.Command
	table  *leases // of the leader that has it in hand
	known  bool    // it has called attached, which gave end
	end    time.Duration
}

// gatewayModel is one gateway process. It serves reads of its epoch until
// lease, in its own time.
type gatewayModel struct {
	session string
	epoch   uint32 // 0: does not serve
	lease   time.Duration
	pending bool // asked for an attach

	peeked   *pb.Volume // read for the next attach; others may come before its commit
	renewing *leases    // the leader that has a renewal in hand
	sent     time.Duration
	found    uint32 // the epoch it found to be current
}

func (w *world) do(session string, cmd *pb.Command) *pb.Result {
	if w.seq[session] == 0 {
		state.Apply(w.kv, &pb.Command{Session: session, Op: &pb.Command_OpenSession{OpenSession: &pb.OpenSession{}}})
	}
	w.seq[session]++
	cmd.Session, cmd.Seq = session, w.seq[session]
	return state.Apply(w.kv, cmd)
}

func (w *world) volume() *pb.Volume { return state.VolumeByName(w.kv, "v") }

func (w *world) hostName(h int) string { return fmt.Sprintf("host-%d", h+1) }

// attach commits, as Server.do does around raft.
func (w *world) attach(h int, gone, takeover bool) {
	g := w.hosts[h]
	if g.pending || g.epoch != 0 {
		return
	}
	prev := g.peeked
	if g.peeked = nil; prev == nil {
		prev = w.volume()
	}
	op := &pb.Attach{Volume: "v", Host: w.hostName(h), Session: g.session, PredecessorGone: gone, Takeover: takeover}
	if prev.HolderSession != "" && w.table.held(prev, w.now) == 0 {
		op.Takeover = true
	}
	cmd := &pb.Command{Op: &pb.Command_Attach{Attach: op}}
	res := w.do(g.session, cmd)
	if res.Status != 0 {
		if status.Kind(res.Status) != status.Held {
			w.t.Fatalf("attach: %v", res)
		}
		return
	}
	gone = prev.HolderHost == op.Host && (gone || prev.HolderSession == op.Session)
	g.pending = true
	w.waiting = append(w.waiting, &waitingAttach{host: h, sess: g.session, volume: res.Volume, prev: prev, gone: gone, table: w.table, cmd: cmd})
}

// record is the step between an attach's commit and the wait.
func (w *world) record(h int) {
	for _, a := range w.waiting {
		if a.host == h && !a.known && a.table == w.table {
			a.known, a.end = true, w.table.attached(a.volume, a.prev, a.gone, w.now)
		}
	}
}

// answer returns attaches whose time has come; one whose leader is gone is
// asked again at the new leader.
func (w *world) answer() {
	var still []*waitingAttach
	for _, a := range w.waiting {
		g := w.hosts[a.host]
		if g.session != a.sess {
			continue // its process is dead
		}
		if a.table != w.table {
			prev := w.volume()
			res := state.Apply(w.kv, a.cmd) // the same number: remembered
			if over := w.volume(); status.Kind(res.Status) == status.Fenced && (over.Epoch > a.volume.Epoch || over.HolderSession == "") {
				g.pending = false // somebody else has it by now: never answered
				continue
			}
			if res.Status != 0 || res.Volume.Epoch != a.volume.Epoch {
				w.t.Fatalf("asked again: %v", res)
			}
			a.table, a.prev, a.gone, a.known = w.table, prev, prev.HolderHost == w.hostName(a.host) && prev.HolderSession == a.sess, false
		}
		if !a.known || w.now < a.end {
			still = append(still, a)
			continue
		}
		g.pending, g.epoch, g.lease = false, a.volume.Epoch, 0
		for h, other := range w.hosts {
			if other.epoch != 0 && other.epoch < a.volume.Epoch && h != a.host && w.now < other.lease {
				w.t.Fatalf("attach of epoch %d returned at %v while host-%d serves epoch %d until %v", a.volume.Epoch, w.now, h+1, other.epoch, other.lease)
			}
		}
	}
	w.waiting = still
}

// renew, looked and renewed are the steps of Server.renew: the time is taken
// and the leadership verified, the state is read, the lease is granted. Other
// things happen between them.
func (w *world) renew(h int) {
	if g := w.hosts[h]; g.epoch != 0 && g.renewing == nil {
		g.renewing, g.sent, g.found = w.table, w.now, 0
	}
}

func (w *world) looked(h int) {
	if g := w.hosts[h]; g.renewing != nil && w.holds(h) {
		g.found = g.epoch
	}
}

func (w *world) renewed(h int) {
	g := w.hosts[h]
	table, found := g.renewing, g.found
	g.renewing = nil
	if table == nil || g.epoch == 0 {
		return
	}
	if found != g.epoch || !table.grant(w.volume().Id, g.epoch, w.hostName(h), g.sent) {
		g.epoch, g.lease = 0, 0 // refused: it is over
		return
	}
	g.lease = max(g.lease, g.sent+table.length)
}

func (w *world) holds(h int) bool {
	g, v := w.hosts[h], w.volume()
	return v.Epoch == g.epoch && v.HolderHost == w.hostName(h) && v.HolderSession == g.session
}

func (w *world) release(h int) {
	g := w.hosts[h]
	if v := w.volume(); g.epoch != 0 && v.Epoch == g.epoch && v.HolderHost == w.hostName(h) {
		w.table.release(v.Id, g.epoch, w.hostName(h))
	}
	g.epoch, g.lease = 0, 0
}

// detach is asked for by the holder that has stopped serving; also by one
// whose attach was never answered.
func (w *world) detach(h int) {
	g, v := w.hosts[h], w.volume()
	if v.HolderHost != w.hostName(h) || v.HolderSession != g.session {
		return
	}
	g.epoch, g.lease = 0, 0
	if end := w.table.clear(v); w.now < end {
		return // it waits, and nothing is committed meanwhile
	}
	if res := w.do(g.session, &pb.Command{Op: &pb.Command_Detach{Detach: &pb.Detach{VolumeId: v.Id, Epoch: v.Epoch}}}); res.Status != 0 {
		w.t.Fatalf("detach: %v", res)
	}
	g.pending = false
	w.waiting = nil
}

func (w *world) crash(h int) {
	w.next++
	w.hosts[h] = &gatewayModel{session: fmt.Sprintf("gw-%d-%d", h, w.next)}
}

func newWorld(t *rapid.T) *world {
	w := &world{t: t, kv: state.NewMem(), seq: map[string]uint64{}, table: newLeases(0, 80, 5)}
	w.do("s", &pb.Command{Op: &pb.Command_RegisterHost{RegisterHost: &pb.RegisterHost{Host: &pb.Host{Name: "host-1"}}}})
	w.do("s", &pb.Command{Op: &pb.Command_RegisterStore{RegisterStore: &pb.RegisterStore{Store: &pb.Store{Id: storeID(1), Host: "host-1", CapacityBytes: 1 << 40}}}})
	if res := w.do("s", create("v")); res.Status != 0 {
		t.Fatal(res)
	}
	for h := range w.hosts {
		w.crash(h)
	}
	return w
}

var steps = []func(w *world, h int){
	func(w *world, h int) { w.attach(h, false, false) },
	func(w *world, h int) { w.attach(h, false, true); w.record(h) },
	func(w *world, h int) { w.attach(h, false, true) },
	// Only a process that holds the host's lock file may say that its
	// predecessor is gone; here every older process is.
	func(w *world, h int) { w.attach(h, true, false); w.record(h) },
	func(w *world, h int) { w.crash(h); w.attach(h, true, false); w.record(h) },
	(*world).record,
	(*world).renew,
	(*world).looked,
	(*world).renewed,
	func(w *world, h int) { w.renew(h); w.looked(h); w.renewed(h) },
	func(w *world, h int) { w.renew(h); w.looked(h); w.renewed(h) },
	(*world).release,
	(*world).detach,
	(*world).crash,
	func(w *world, h int) { w.hosts[h].peeked = w.volume() },
	func(w *world, _ int) { w.table = newLeases(w.now, 80, 5) }, // a new leader
}

func TestNoReadOfAnOlderEpochAfterAnAttach(t *testing.T) {
	t.Parallel()
	if err := flag.Set("rapid.checks", checks); err != nil {
		t.Fatal(err)
	}
	attached, waited := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			h := rapid.IntRange(0, len(w.hosts)-1).Draw(t, "host")
			rapid.SampledFrom(steps).Draw(t, "what")(w, h)
			if rapid.Bool().Draw(t, "time") {
				w.now += time.Duration(rapid.IntRange(1, 50).Draw(t, "by"))
			}
			n := len(w.waiting)
			w.answer()
			attached += n - len(w.waiting)
			waited += len(w.waiting)
		}
	})
	if attached == 0 || waited == 0 {
		t.Fatalf("%d attaches returned, %d steps saw one wait: the test tries nothing", attached, waited)
	}
}

// The cases that must not wait: an operator or a guest would.
func TestAttachThatNeedNotWait(t *testing.T) {
	const at = 1000
	v := func(epoch uint32, host string, moved bool) *pb.Volume {
		return &pb.Volume{Id: 1, Epoch: epoch, HolderHost: host, HolderSession: "s-" + host, Moved: moved}
	}
	free := func(epoch uint32) *pb.Volume { return &pb.Volume{Id: 1, Epoch: epoch} }
	for _, x := range []struct {
		what  string
		heard func(l *leases)
		prev  *pb.Volume
		now   *pb.Volume
		gone  bool
		want  time.Duration
	}{
		{"the first epoch", nil, free(0), v(1, "a", false), false, 0},
		{"after a detach", nil, free(4), v(5, "a", false), false, 0},
		{"its own predecessor is dead", nil, v(4, "a", false), v(5, "a", false), true, 0},
		{"its own predecessor is dead but took over", nil, v(4, "a", true), v(5, "a", true), true, at + 85},
		{"the same, and has renewed since", func(l *leases) { l.grant(1, 4, "a", at) }, v(4, "a", true), v(5, "a", true), true, 0},
		{"asked again at a new leader", nil, v(5, "a", false), v(5, "a", false), true, 0},
		{"a new leader knows nothing", nil, v(4, "a", false), v(5, "b", true), false, at + 85},
		{"granted", func(l *leases) { l.grant(1, 4, "a", at+30) }, v(4, "a", false), v(5, "b", true), false, at + 115},
		{"released", func(l *leases) { l.grant(1, 4, "a", at+30); l.release(1, 4, "a") }, v(4, "a", false), v(5, "b", true), false, 0},
		{"released by another host", func(l *leases) { l.grant(1, 4, "a", at+30); l.release(1, 4, "b") }, v(4, "a", false), v(5, "b", true), false, at + 115},
		{"something came between", nil, free(3), v(5, "a", true), false, at + 85},
		{"something came between, and was answered", func(l *leases) { l.grant(1, 4, "c", at+30) }, free(3), v(5, "a", true), false, at + 115},
	} {
		l := newLeases(at, 80, 5)
		if x.heard != nil {
			x.heard(l)
		}
		if got := l.attached(x.now, x.prev, x.gone, at+40); got != x.want {
			t.Errorf("%s: answered at %d, want %d", x.what, got, x.want)
		}
		if again := l.attached(x.now, x.now, x.gone, at+50); again != x.want {
			t.Errorf("%s, asked again: answered at %d, want %d", x.what, again, x.want)
		}
	}
}

// checks of the property in one run.
const checks = "1500"
