package sim

import (
	"bytes"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/server"
	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/placement/driver"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

const volumeName = "v"

// meta is the metadata service: one committed log applied to the production
// state machine, and a leader that may be another one, or none, at any time.
// What a leader has proposed and not committed when it falls is carried over by
// the next one up to some entry, and lost behind it.
type meta struct {
	w       *world
	kv      *state.Mem
	log     []*pb.Command // committed; for the followers that check it at the end
	placer  server.Placer
	leader  *leader // nil: none
	terms   int
	pending []*proposal // not committed; in log order
	agents  []*agent    // hosts' own clients, by host
	calls   int         // of all clients, not answered
	sent    int         // requests under way, of processes that were killed too
	results map[string][]byte
}

// leader is one term: what it knows by itself ends with it.
type leader struct {
	term   int
	clock  clock
	leases server.LeaseTable
}

// proposal is a command on its way into the log.
type proposal struct {
	by  *leader
	cmd *pb.Command
	// done hears the result, or nil when the outcome is unknown to the leader
	// that proposed it.
	done func(*pb.Result)
}

func newMeta(w *world) *meta {
	m := &meta{w: w, kv: state.NewMem(), placer: driver.New(), results: map[string][]byte{}}
	m.elect()
	return m
}

func (m *meta) hash() uint64 { return state.HashAll(m.kv) }

// idle: nobody waits for an answer, and nothing that somebody has asked is yet to
// arrive or to be committed.
func (m *meta) idle() bool { return m.calls == 0 && m.sent == 0 && len(m.pending) == 0 }

// elect begins a term; the time is not before the election.
func (m *meta) elect() {
	m.terms++
	c := newClock(m.w)
	m.leader = &leader{term: m.terms, clock: c, leases: server.NewLeaseTable(c.at(m.w.now))}
	m.w.note("meta", "elected", func() string { return fmt.Sprintf("term %d", m.terms) }, uint64(m.terms))
}

// fall ends the leader's term. The first so many of what it has proposed are in
// the log, whatever their clients hear.
func (m *meta) fall() {
	if m.leader == nil {
		return
	}
	kept := m.w.rng.IntN(len(m.pending) + 1)
	m.w.note("meta", "leader falls", func() string { return fmt.Sprintf("%d of %d proposals survive", kept, len(m.pending)) }, uint64(kept))
	m.leader = nil
	pending := m.pending
	m.pending = nil
	for i, p := range pending {
		if i < kept {
			m.apply(p.cmd)
		}
		p.done(nil)
	}
}

// do is server.do: check, prepare, commit, finish. reply is called once, in the
// service's process.
func (m *meta) do(cmd *pb.Command, reply func(*pb.Result)) {
	l := m.leader
	if l == nil {
		reply(refused(status.Errorf(status.Unavailable, "no leader")))
		return
	}
	cmd = proto.Clone(cmd).(*pb.Command)
	var prev *pb.Volume
	switch op := cmd.Op.(type) {
	case *pb.Command_Attach:
		prev = state.VolumeByName(m.kv, op.Attach.Volume)
		if prev != nil && prev.HolderSession != "" && l.leases.Held(prev, l.clock.at(m.w.now)) == 0 {
			op.Attach.Takeover = true
		}
	case *pb.Command_Detach:
		v := state.VolumeByID(m.kv, op.Detach.VolumeId)
		if v == nil || v.Epoch != op.Detach.Epoch || v.HolderSession == "" {
			break
		}
		m.waitUntil(l, l.leases.Clear(v), func() { m.propose(l, cmd, nil, reply) }, func() {
			reply(refused(status.Errorf(status.Unavailable, "the leader changed")))
		})
		return
	case *pb.Command_Allocate:
		if err := m.place(op.Allocate); err != nil {
			reply(refused(err))
			return
		}
	case *pb.Command_MoveChunks:
		if v := state.VolumeByID(m.kv, op.MoveChunks.VolumeId); v != nil {
			if err := server.PlaceMoves(m.kv, m.placer, op.MoveChunks, m.views(v)); err != nil {
				reply(refused(err))
				return
			}
		}
	}
	m.propose(l, cmd, prev, reply)
}

func refused(err error) *pb.Result {
	return &pb.Result{Status: uint32(status.Of(err)), Detail: err.Error(), Refused: true}
}

var errUnknown = status.Errorf(status.Unknown, "leadership lost")

// propose puts a command into the log; it is committed after a while, if the
// leader lasts.
func (m *meta) propose(l *leader, cmd *pb.Command, prev *pb.Volume, reply func(*pb.Result)) {
	unknown := &pb.Result{Status: uint32(status.Unknown), Detail: errUnknown.Error()}
	if m.leader != l {
		reply(refused(status.Errorf(status.Unavailable, "not the leader any more")))
		return
	}
	cmd.TimeUnixNs = int64(l.clock.at(m.w.now))
	p := &proposal{by: l, cmd: cmd}
	p.done = func(res *pb.Result) {
		at := cmd.GetAttach()
		switch {
		case res == nil:
			reply(unknown)
		case res.Status == 0 && cmd.GetHandOver() != nil:
			l.leases.Handed(res.Volume, l.clock.at(m.w.now))
			reply(res)
		case res.Status != 0 || at == nil:
			reply(res)
		case m.leader != l:
			reply(unknown)
		default:
			gone := prev != nil && prev.HolderHost == at.Host && (at.PredecessorGone || prev.HolderSession == at.Session)
			end := l.leases.Attached(res.Volume, prev, gone, l.clock.at(m.w.now))
			m.waitUntil(l, end, func() { reply(res) }, func() { reply(unknown) })
		}
	}
	m.pending = append(m.pending, p)
	m.w.after(m.w.span(300*time.Microsecond, 4*time.Millisecond), func() { m.commit(p) })
}

// commit commits everything up to p.
func (m *meta) commit(p *proposal) {
	at := -1
	for i, o := range m.pending {
		if o == p {
			at = i
		}
	}
	if at < 0 {
		return
	}
	ready := m.pending[: at+1 : at+1]
	m.pending = m.pending[at+1:]
	for _, o := range ready {
		o.done(m.apply(o.cmd))
	}
}

// apply is the log's next entry, on the production state machine.
func (m *meta) apply(cmd *pb.Command) *pb.Result {
	m.log = append(m.log, cmd)
	res := state.Apply(m.kv, cmd)
	m.w.note("meta", "commit", func() string { return describe(cmd, res) }, cmd.Seq, uint64(res.Status))
	m.w.check.committed(cmd, res)
	return res
}

// waitUntil waits for a moment of the leader's clock; when its term ends first,
// or the wait is longer than a call may take, it is in vain.
func (m *meta) waitUntil(l *leader, end time.Duration, then, vain func()) {
	switch {
	case m.leader != l:
		vain()
	case l.clock.at(m.w.now) >= end:
		then()
	default:
		step := min(l.clock.until(end, m.w.now), 50*time.Millisecond)
		m.w.after(step, func() { m.waitUntil(l, end, then, vain) })
	}
}

// renew is server.renew: the time, then the leadership, then the grant.
func (m *meta) renew(req *pb.RenewRequest, reply func(*pb.RenewReply)) {
	l := m.leader
	if l == nil {
		return
	}
	now := l.clock.at(m.w.now)
	m.w.after(m.w.span(200*time.Microsecond, 3*time.Millisecond), func() {
		if m.leader != l {
			return
		}
		rep := &pb.RenewReply{LeaseMs: uint32(l.leases.Length().Milliseconds())}
		for _, x := range req.Leases {
			v := state.VolumeByID(m.kv, x.VolumeId)
			held := v != nil && v.Epoch == x.Epoch && v.HolderHost == req.Host && v.HolderSession == req.Session
			if held && l.leases.Grant(x.VolumeId, x.Epoch, req.Host, now) {
				rep.Volumes = append(rep.Volumes, state.Leaving(m.kv, v))
			} else {
				rep.Refused = append(rep.Refused, x)
			}
		}
		reply(rep)
	})
}

// place is server.place: the production placer chooses.
func (m *meta) place(op *pb.Allocate) error {
	op.Chunks = nil
	v := state.VolumeByID(m.kv, op.VolumeId)
	var missing []uint32
	for _, ix := range op.Indices {
		if v != nil && state.ChunkAt(m.kv, v.Id, ix) == nil {
			missing = append(missing, ix)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	req := server.ChunkRequest{Volume: ids.VolumeID(v.Id), Count: len(missing), Replicas: int(v.Replicas), ChunkBytes: v.ChunkBytes, PreferHost: op.PreferHost, Stores: m.views(v)}
	places, err := m.placer.PlaceChunks(req)
	if err != nil {
		return err
	}
	for i, stores := range places {
		c := &pb.Chunk{Index: missing[i]}
		for _, id := range stores {
			c.Stores = append(c.Stores, bytes.Clone(id[:]))
		}
		op.Chunks = append(op.Chunks, c)
	}
	return nil
}

// views is server.storeViews.
func (m *meta) views(v *pb.Volume) []server.StoreView {
	var out []server.StoreView
	for _, n := range m.w.nodes {
		s := state.StoreByID(m.kv, n.id[:])
		if s == nil || s.Retired || state.HostByName(m.kv, n.host).GetDrained() && m.memberOf(v, n) == nil {
			continue
		}
		view := server.StoreView{ID: n.id, Host: n.host, Domain: n.host, Up: n.up(), CapacityBytes: s.CapacityBytes}
		for _, mem := range v.Members {
			if bytes.Equal(mem.Store, n.id[:]) {
				view.Member, view.InSync = true, mem.InSync
			}
		}
		if n.up() {
			view.UsedBytes = n.store.Usage().UsedBytes
		}
		out = append(out, view)
	}
	return out
}

// volume is the volume as the state machine has it now; checkers and fairness
// look here, the cluster's own parts ask.
func (m *meta) volume() *pb.Volume { return state.VolumeByName(m.kv, volumeName) }

func (m *meta) chunks() []*pb.Chunk { return state.Chunks(m.kv, m.volume().GetId()) }

// inSync reports whether a store is an in-sync member as committed, or not a
// member yet.
func (m *meta) member(n *node) *pb.Member {
	return m.memberOf(m.volume(), n)
}

func (m *meta) memberOf(v *pb.Volume, n *node) *pb.Member {
	for _, mem := range v.GetMembers() {
		if bytes.Equal(mem.Store, n.id[:]) {
			return mem
		}
	}
	return nil
}

func (m *meta) picture() string {
	out := "metadata: "
	if m.leader == nil {
		out += "no leader, "
	}
	v := m.volume()
	out += fmt.Sprintf("%d calls unanswered, epoch %d held by %q, revision %d:", m.calls, v.GetEpoch(), v.GetHolderSession(), v.GetRevision())
	for _, mem := range v.GetMembers() {
		out += fmt.Sprintf(" %s=%v", mem.Host, mem.InSync)
	}
	return out
}

func describe(cmd *pb.Command, res *pb.Result) string {
	out := fmt.Sprintf("%s %d %v", cmd.Session, cmd.Seq, cmd.Op)
	if c := cmd.GetChangeMembers(); c != nil {
		out = fmt.Sprintf("%s %d change", cmd.Session, cmd.Seq)
		for _, ch := range c.Changes {
			out += fmt.Sprintf(" at %d.%d exclude %x add %x", ch.Epoch, ch.Revision, firstBytes(ch.Exclude...), firstBytes(ch.Add))
		}
		for _, r := range res.Members {
			out += fmt.Sprintf(" → %s, revision %d", status.Kind(r.Status), r.Revision)
		}
	}
	return out + " → " + status.Kind(res.Status).String() + " " + res.Detail
}

func firstBytes(bs ...[]byte) []byte {
	var out []byte
	for _, b := range bs {
		if len(b) > 0 {
			out = append(out, b[0])
		}
	}
	return out
}
