package volume

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

const (
	testChunk  = 64 * ids.BlockSize
	testSize   = 4 * testChunk
	testStores = 3
	testHot    = testSize / ids.BlockSize / 8 // blocks the seeded loads use
)

// world is an engine, its stores and its metadata, driven by one seed: pending
// messages are delivered in random order, links fall, gateways die. A request
// on its way survives its connection, and its gateway, until a later seal.
type world struct {
	t       *testing.T
	seed    uint64
	rng     *rand.Rand
	now     time.Duration
	stores  []*memStore
	vol     *pb.Volume
	chunks  []*pb.Chunk
	e       *Engine
	out     Out
	pending []func()
	life    int
	blocks  map[uint64]*register
	done    map[*Op]func(status.Kind)
	flaky   bool                              // metadata answers Unknown and Unavailable
	hold    func(*MetaCall) bool              // true: no answer now
	metas   []*pb.MemberChange                // that were committed
	lease   time.Duration                     // of each attach; 0: for ever
	keep    func(i int, q *wire.Request) bool // true: the request does not arrive, now
	kept    []func()
	cuts    []CutNews // not looked at yet
	onCuts  func()
	listed  func(Listed)
	origins func() []*pb.OriginState // what the volume is a clone of; nil: of nothing
	prunes  int
	copies  uint32           // of each chunk
	leaving map[int]bool     // members whose chunks are to go elsewhere
	left    map[int]bool     // members no more
	spare   []int            // stores that are no members
	moves   []*pb.MoveChunks // that were committed
	grace   time.Duration
}

// register is what one block may hold.
type register struct {
	may    map[byte]bool // values a read may return
	hist   []byte        // values a power loss may leave: the last durable one, and later ones
	busy   bool          // a write is in flight
	all    []byte        // values of all writes
	over   int           // completed writes
	life   int           // of the gateway that wrote last
	shaken bool          // all power was lost while the write was in flight
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), blocks: map[uint64]*register{}, done: map[*Op]func(status.Kind){}}
	w.copies, w.leaving, w.left = testStores, map[int]bool{}, map[int]bool{}
	w.vol = &pb.Volume{Id: 1, Name: "v", SizeBytes: testSize, ChunkBytes: testChunk, Revision: 1}
	w.addStores(testStores)
	return w
}

func (w *world) addStores(n int) {
	w.stores, w.vol.Members, w.copies = nil, nil, uint32(n)
	for i := range n {
		s := newMemStore(i)
		w.stores = append(w.stores, s)
		w.vol.Members = append(w.vol.Members, &pb.Member{Store: s.id[:], Incarnation: 1, Host: fmt.Sprint("host-", i+1), InSync: true})
	}
}

// fail stops the test, naming the seed.
func (w *world) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("seed %d: %s\nengine: %+v\n%s", w.seed, fmt.Sprintf(format, args...), w.e.Info(), w.picture())
}

// picture tells the members' state, for a failure.
func (w *world) picture() string {
	out := fmt.Sprintf("metadata: epoch %d, revision %d; engine busy with metadata: %v\n", w.vol.Epoch, w.vol.Revision, w.e.metaBusy())
	for i, r := range w.e.replicas {
		s := w.stores[i]
		if i >= len(w.vol.Members) {
			out += fmt.Sprintf("%d: of the origin, up %v hung %v; engine up %v busy %d\n", i, s.up, s.hung, r.up, r.busy)
			continue
		}
		out += fmt.Sprintf("%d: store up %v hung %v full %v intact %v floor %v, in-sync %v; engine in-sync %v up %v sealed %v excluding %v doubt %v gen %d (store %d) join %+v busy %d why %q\n",
			i, s.up, s.hung, s.full, s.intact, s.floor, w.vol.Members[i].InSync, r.inSync, r.up, r.sealed, r.excluding, r.doubt, r.gen, s.gen, r.join, r.busy, r.why)
	}
	return out
}

// attach ends the gateway as kill -9 does and attaches anew.
func (w *world) attach() {
	w.life++
	clear(w.done)
	for _, r := range w.blocks {
		r.busy = false
	}
	w.vol.Epoch++
	w.giveUpOpen()
	e, err := New(w.now, Config{Host: "host-1", Volume: w.known(), Chunks: w.chunks, Grace: w.grace, Origins: w.originStates()}, &w.out)
	if err != nil {
		w.t.Fatal(err)
	}
	w.e = e
	w.drain()
	until := time.Duration(1 << 60)
	if w.lease > 0 {
		until = w.now + w.lease
	}
	w.step(&Lease{Until: until})
}

func (w *world) originStates() []*pb.OriginState {
	if w.origins == nil {
		return nil
	}
	return w.origins()
}

// serving attaches and waits until it serves.
func (w *world) serving() {
	w.attach()
	w.until("serving", func() bool { return w.e.State() == Serving })
}

// known is the volume as metadata knows it.
func (w *world) known() *pb.Volume {
	v := &pb.Volume{Id: w.vol.Id, Name: "v", Origin: w.vol.Origin, SizeBytes: w.vol.SizeBytes, ChunkBytes: testChunk, Epoch: w.vol.Epoch, Revision: w.vol.Revision,
		Qos: w.vol.Qos, ShrunkFrom: w.vol.ShrunkFrom, Cuts: w.vol.Cuts, CutUpto: w.vol.CutUpto,
		Top: w.vol.Top, LastLayer: w.vol.LastLayer, Replicas: w.copies}
	for _, l := range w.vol.Layers {
		v.Layers = append(v.Layers, proto.Clone(l).(*pb.Layer))
	}
	for i, m := range w.vol.Members {
		if !w.left[i] {
			v.Members = append(v.Members, &pb.Member{Store: m.Store, Incarnation: m.Incarnation, Host: m.Host, InSync: m.InSync, Leaving: w.leaving[i]})
		}
	}
	return v
}

func (w *world) step(ev Event) {
	w.e.Step(w.now, ev, &w.out)
	w.drain()
}

// toEngine queues an event for the engine of now.
func (w *world) toEngine(f func()) {
	life := w.life
	w.pending = append(w.pending, func() {
		if life == w.life {
			f()
		}
	})
}

// drain turns actions into pending deliveries.
func (w *world) drain() {
	out := w.out
	w.out = Out{}
	for _, l := range out.Links {
		if l.Open {
			w.toEngine(func() { w.connect(l.Replica) })
		}
	}
	for _, s := range out.Sends {
		w.send(s)
	}
	for _, m := range out.Meta {
		if w.hold != nil && w.hold(m) {
			continue
		}
		w.toEngine(func() { w.meta(m) })
	}
	w.cuts = append(w.cuts, out.Cuts...)
	for _, d := range out.Done {
		if f := w.done[d.Op]; f != nil {
			delete(w.done, d.Op)
			f(d.Status)
		}
	}
	for _, l := range out.Listed {
		w.listed(l)
	}
	if len(out.Cuts) > 0 && w.onCuts != nil {
		w.onCuts()
	}
}

func (w *world) send(s Send) {
	st, i, q, life := w.stores[s.Replica], s.Replica, *s.Req, w.life
	q.Sums, q.Entries = append([]uint32(nil), q.Sums...), append([]wire.Entry(nil), q.Entries...)
	q.Data = bytes.Clone(q.Data) // the connection copies it, as chunk/stream does
	var arrive func()
	arrive = func() {
		if st.hung {
			st.held = append(st.held, arrive)
			return
		}
		if w.keep != nil && w.keep(i, &q) {
			w.kept = append(w.kept, arrive)
			return
		}
		if !st.up || s.Gen < st.session && life == w.life {
			return
		}
		rep := st.do(&q)
		if q.Kind == wire.Seal && rep.Status == status.OK {
			st.session = s.Gen
		}
		w.toEngine(func() {
			if life == w.life {
				w.step(&Replies{i, s.Gen, []*wire.Reply{rep}})
			}
		})
	}
	w.pending = append(w.pending, arrive)
}

func (w *world) connect(i int) {
	s := w.stores[i]
	if !s.up {
		w.step(&Lost{i, "refused"})
		return
	}
	s.gen++
	w.step(&Up{i, s.gen})
}

// meta lets metadata carry a command out. When it is flaky the answer may be
// lost, before or after the command took effect.
func (w *world) meta(m *MetaCall) {
	if w.flaky {
		switch w.rng.IntN(6) {
		case 0:
			w.step(&MetaDone{Call: m, Err: status.Errorf(status.Unavailable, "no leader")})
			return
		case 1:
			w.commit(m)
			w.step(&MetaDone{Call: m, Err: status.Errorf(status.Unknown, "leadership lost")})
			return
		case 2: // takes effect, if it still may, after the answer
			w.step(&MetaDone{Call: m, Err: status.Errorf(status.Unknown, "leadership lost")})
			w.pending = append(w.pending, func() { w.commit(m) })
			return
		}
	}
	res, err := w.commit(m)
	conflict := status.Of(err) == status.Conflict
	for _, r := range res.GetMembers() {
		conflict = conflict || status.Kind(r.Status) == status.Conflict
	}
	if conflict {
		w.toEngine(func() { w.step(&Refresh{Volume: w.known()}) })
	}
	w.step(&MetaDone{Call: m, Result: res, Err: err})
}

// commit is the state machine: compare-and-set on epoch and revision.
func (w *world) commit(m *MetaCall) (*pb.Result, error) {
	switch {
	case m.Allocate != nil:
		return w.allocate(m.Allocate)
	case m.Move != nil:
		return w.move(m.Move)
	case m.Change != nil:
		r := w.change(m.Change.Changes[0])
		return &pb.Result{Members: []*pb.MemberResult{r}}, nil
	case m.Prune != nil:
		return w.prune(m.Prune)
	case m.Look:
		if w.origins != nil {
			w.step(&Origins{States: w.origins(), Call: m})
		}
		w.step(&Refresh{Volume: w.known()})
	}
	return &pb.Result{}, nil
}

func (w *world) allocate(a *pb.Allocate) (*pb.Result, error) {
	if a.Epoch != w.vol.Epoch {
		return nil, status.Errorf(status.Fenced, "epoch %d is over", a.Epoch)
	}
	if a.Revision != w.vol.Revision {
		return nil, status.Errorf(status.Conflict, "revision %d is not the current one", a.Revision)
	}
	res := &pb.Result{}
	for _, i := range a.Indices {
		c := w.chunkAt(i)
		if c == nil {
			c = &pb.Chunk{Index: i, Id: uint64(i) + 100*w.vol.Id}
			for i, m := range w.vol.Members {
				if !w.left[i] && len(c.Stores) < int(w.copies) {
					c.Stores = append(c.Stores, m.Store)
				}
			}
			w.chunks = append(w.chunks, c)
		}
		res.Chunks = append(res.Chunks, c)
	}
	res.Volume = w.known()
	return res, nil
}

func (w *world) chunkAt(i uint32) *pb.Chunk {
	for _, c := range w.chunks {
		if c.Index == i {
			return c
		}
	}
	return nil
}

func (w *world) change(ch *pb.MemberChange) *pb.MemberResult {
	if ch.Epoch != w.vol.Epoch {
		return &pb.MemberResult{Status: uint32(status.Fenced), Revision: w.vol.Revision}
	}
	if ch.Revision != w.vol.Revision {
		return &pb.MemberResult{Status: uint32(status.Conflict), Revision: w.vol.Revision}
	}
	left := 0
	for _, mem := range w.vol.Members {
		out := false
		for _, x := range ch.Exclude {
			out = out || bytes.Equal(x, mem.Store)
		}
		if bytes.Equal(ch.Add, mem.Store) {
			mem.Incarnation = ch.AddIncarnation
		}
		mem.InSync = (mem.InSync || bytes.Equal(ch.Add, mem.Store)) && !out
		if mem.InSync {
			left++
		}
	}
	if left == 0 {
		w.fail("everybody was excluded")
	}
	w.vol.Revision++
	w.metas = append(w.metas, ch)
	w.checkPower()
	return &pb.MemberResult{Revision: w.vol.Revision}
}

// deliver lets one random pending thing happen, and time pass a little.
func (w *world) deliver() {
	if n := len(w.pending); n > 0 && w.rng.IntN(8) > 0 {
		i := w.rng.IntN(n)
		f := w.pending[i]
		w.pending[i] = w.pending[n-1]
		w.pending = w.pending[:n-1]
		f()
		return
	}
	w.now += time.Duration(w.rng.IntN(20)) * time.Millisecond
	w.step(&Tick{})
}

func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	for range 200_000 {
		if ok() {
			return
		}
		w.deliver()
	}
	w.fail("never: %s", what)
}

// settleFor lets a span of the world's time pass.
func (w *world) settleFor(d time.Duration) {
	for end := w.now + d; w.now < end; {
		w.deliver()
	}
}

// fall takes a store's process away and brings it back later.
func (w *world) fall(i int) {
	s := w.stores[i]
	if s.up {
		s.up, s.hung, s.held = false, false, nil
		w.step(&Down{i, s.gen, "reset"})
		w.connect(i)
		return
	}
	s.up = true
	w.connect(i)
}

// restart is a kill of a store's process that is over before anybody finds it
// away: the connection goes and another comes.
func (w *world) restart(i int) {
	w.step(&Down{i, w.stores[i].gen, "reset"})
	w.connect(i)
}

// hang stops a store's answers; again, it goes on with what it was sent.
func (w *world) hang(i int) {
	s := w.stores[i]
	s.hung = !s.hung
	w.pending = append(w.pending, s.held...)
	s.held = nil
}

// release lets what was kept arrive.
func (w *world) release() {
	w.keep = nil
	w.pending = append(w.pending, w.kept...)
	w.kept = nil
}

// heal brings every store back.
func (w *world) heal() {
	for i, s := range w.stores {
		s.full = false
		if s.hung {
			w.hang(i)
		}
		if !s.up {
			w.fall(i)
		}
	}
}

func (w *world) idle() bool { return len(w.done) == 0 }

func (w *world) allInSync() bool {
	for _, r := range w.e.Info().Replicas {
		if r.State != "in-sync" && r.State != "origin" {
			return false
		}
	}
	return true
}

func (w *world) down() int {
	for i, s := range w.stores {
		if !s.up {
			return i
		}
	}
	return -1
}

func (w *world) same() {
	w.t.Helper()
	for _, s := range w.stores[1:len(w.vol.Members)] {
		for k, b := range w.stores[0].blocks {
			if o := s.blocks[k]; o.en != b.en || !bytes.Equal(o.data, b.data) {
				w.fail("%v differs between members: %+v and %+v", k, b.en, o.en)
			}
		}
		if len(s.blocks) != len(w.stores[0].blocks) {
			w.fail("members hold %d and %d blocks", len(w.stores[0].blocks), len(s.blocks))
		}
	}
}
