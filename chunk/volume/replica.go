package volume

import (
	"fmt"
	"time"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// replica is one member store of the volume.
//
//	readable ⇔ inSync ∧ up ∧ sealed ∧ ¬excluding;  required ⇔ inSync ∨ join.required
type replica struct {
	index       int
	store       ids.StoreID
	host, addr  string
	repairing   int // blocks a scrub found bad that are being repaired, ≤ damageBatch
	incarnation ids.Incarnation
	local       bool // on this gateway's host

	foreign     bool                    // gone, or never a member: an origin's store, to be read from only
	told        map[ids.VolumeID]uint64 // of an origin: the connection over which it was asked for lives
	inSync      bool                    // as committed at e.revision
	up          bool                    // connection gen is ready
	sealed      bool                    // and the store has answered our epoch's seal over it
	lost        bool                    // the shell could not reach it
	intact      bool                    // from the seal
	floor       ids.Version
	gen         uint64
	doubt       bool // while in-sync it lost power, or failed a flush: it may lack what was accepted
	excluding   bool // to be excluded as soon as the rules and metadata allow
	why         string
	bouncedAt   time.Duration // it failed, or its connection was given up on purpose, last
	join        *join
	joinAfter   time.Duration // not before: backs off
	joinTries   int           // that failed since the last success
	joinedBytes uint64

	merging  int           // merges it has to answer
	leaving  bool          // metadata wants its chunks elsewhere
	gone     bool          // no member any more; its index stays
	outSince time.Duration // of a member that is out: since when this engine knows
	filling  int           // copies being made on it, and from it
	pulse    pulse

	slots     []slot
	free      []uint32
	busy      int // requests outstanding
	lastReply time.Duration
	alive     uint64 // it has answered something that was sent after so many doubts: ≤ e.doubts
	pinging   bool   // it owes the answer to a ping
	suspected uint64 // it is excluding, or its join is dead, since that doubt: ≤ e.doubts
}

// slot is one outstanding request. Exactly one of job, read and on is set.
type slot struct {
	job  *job
	read *read
	on   func(*wire.Reply)
	pos  int
	at   time.Duration
	tag  uint32 // tells this use of the slot from earlier ones
	late uint64 // e.doubts when it was sent
	used bool
}

func (r *replica) readable() bool { return r.inSync && r.up && r.sealed && !r.excluding }

func (r *replica) required() bool { return r.inSync || (r.join != nil && r.join.required) }

// writable reports whether writes are to be sent to it now.
func (r *replica) writable() bool {
	return r.up && r.sealed && !r.excluding && (r.inSync || r.join != nil)
}

func (r *replica) stateName() string {
	switch {
	case r.foreign:
		return "origin"
	case r.gone:
		return "gone"
	case r.readable():
		return "in-sync"
	case r.inSync:
		return "lost"
	case r.join != nil:
		return "joining"
	}
	return "out"
}

// addMembers enters members the engine does not know and opens their links.
func (e *Engine) addMembers(ms []*pb.Member) {
	for _, m := range ms {
		id, err := ids.StoreIDFromBytes(m.Store)
		if err != nil {
			continue
		}
		if r := e.byStore[id]; r != nil {
			if r.gone {
				r.foreign = false
				e.comeBack(r, m)
			}
			continue
		}
		r := &replica{index: len(e.replicas), store: id, host: m.Host, addr: m.DataAddr, local: m.Host == e.cfg.Host,
			incarnation: ids.Incarnation(m.Incarnation), inSync: m.InSync, leaving: m.Leaving, outSince: e.now}
		e.replicas = append(e.replicas, r)
		e.byStore[id] = r
		e.out.Links = append(e.out.Links, LinkAction{r.index, true})
	}
}

// send gives a request its identity and puts it into the outbox.
func (e *Engine) send(r *replica, q *wire.Request, s slot) {
	var i uint32
	if n := len(r.free); n > 0 {
		i = r.free[n-1]
		r.free = r.free[:n-1]
	} else {
		i = uint32(len(r.slots))
		r.slots = append(r.slots, slot{})
	}
	s.tag, s.used, s.at, s.late = r.slots[i].tag+1, true, e.now, e.doubts
	r.slots[i] = s
	r.busy++
	q.ID = uint64(s.tag)<<32 | uint64(i)
	q.Store, q.Epoch = r.store, e.epoch
	if q.Flags&wire.FlagFrozen == 0 { // else it may be of an origin
		q.Volume = e.volume
	}
	e.out.Sends = append(e.out.Sends, Send{r.index, r.gen, q})
}

// call sends a request whose answer, or Unavailable when the link goes or is
// gone already, comes to on.
func (e *Engine) call(r *replica, q *wire.Request, on func(*wire.Reply)) {
	if !r.up {
		on(&wire.Reply{Kind: q.Kind, Status: status.Unavailable, Detail: "connection lost"})
		return
	}
	e.send(r, q, slot{on: on})
}

// replies takes answers. Those of earlier connections and of slots that were
// given up are ignored.
func (e *Engine) replies(ev *Replies) {
	r := e.replicas[ev.Replica]
	for _, rep := range ev.Replies {
		i := uint32(rep.ID)
		if r.gen != ev.Gen || !r.up || e.state == Ended || int(i) >= len(r.slots) || !r.slots[i].used || r.slots[i].tag != uint32(rep.ID>>32) {
			continue
		}
		r.lastReply = e.now
		s := &r.slots[i]
		r.alive = max(r.alive, s.late)
		if s.job != nil {
			r.pulse.add(e.now - s.at)
		}
		if rep.Status == status.Fenced { // before its slot is freed: end answers what is in it
			e.endFenced(fmt.Sprintf("store %s on %s has sealed epoch %d", r.store.Short(), r.host, rep.Epoch))
			return
		}
		e.answer(r, e.freeSlot(r, i), rep)
	}
}

func (e *Engine) freeSlot(r *replica, i uint32) slot {
	s := r.slots[i]
	r.slots[i] = slot{tag: s.tag}
	r.free = append(r.free, i)
	r.busy--
	return s
}

func (e *Engine) answer(r *replica, s slot, rep *wire.Reply) {
	switch {
	case s.job != nil:
		s.job.legs[s.pos].answered(e.now-s.at, rep.Took, r.local)
		e.accepted(r, s.job, s.pos, rep)
	case s.read != nil:
		s.read.legs[s.pos].answered(e.now-s.at, rep.Took, r.local)
		e.readReply(r, s.read, s.pos, rep)
	default:
		s.on(rep)
	}
}

// replicaFailed deals with an answer that says the store cannot go on.
func (e *Engine) replicaFailed(r *replica, rep *wire.Reply) {
	why := fmt.Sprintf("%s: %s", rep.Kind, rep.Err())
	if r.inSync {
		e.exclude(r, why)
	} else {
		e.abortJoin(r, why)
	}
}

// linkUp seals the store over the new connection before anything else.
func (e *Engine) linkUp(ev *Up) {
	r := e.replicas[ev.Replica]
	if e.state == Ended || ev.Gen <= r.gen {
		return
	}
	if r.up {
		e.linkGone(r, "connected anew")
	}
	r.gen, r.up, r.lost, r.sealed, r.lastReply = ev.Gen, true, false, false, e.now
	if r.inSync {
		e.seal(r)
	} // a member that is out joins: stepJoins
	e.askLives()
	e.retryViews()
}

// seal raises the store's epoch for the volume; the answer tells what it holds.
func (e *Engine) seal(r *replica) {
	e.call(r, &wire.Request{Kind: wire.Seal, Count: uint32(r.gen)}, func(rep *wire.Reply) {
		if rep.Status == status.Unavailable || !r.inSync {
			return
		}
		if rep.Status != status.OK {
			e.replicaFailed(r, rep)
			return
		}
		r.intact, r.floor = rep.Flags&wire.FlagIntact != 0, rep.Floor
		if rep.Incarnation != r.incarnation {
			e.exclude(r, fmt.Sprintf("incarnation %d instead of %d: not the store that was in sync", rep.Incarnation, r.incarnation))
			return
		}
		if e.state == Attaching {
			r.sealed = true
			if r.excluding && !e.inCall(r) {
				r.excluding = false
			}
			return
		}
		if !r.intact || r.doubt {
			e.lostPower(r)
			return
		}
		r.sealed = true
		e.resume(r)
	})
}

// lostPower deals with an in-sync replica that came back without something it
// may have accepted. If everything acknowledged is durable it lacks nothing of
// that, and gets the rest again; else it is excluded; and when that is true of
// all, writes are lost that a client may rely on: it must be told.
func (e *Engine) lostPower(r *replica) {
	if !r.doubt && !e.dirty() && !e.flush.running {
		for _, j := range e.inFlight.all() {
			for pos, o := range j.c.replicas {
				if o == r {
					j.have &^= 1 << pos
				}
			}
		}
		e.call(r, &wire.Request{Kind: wire.Settle, Floor: e.floor}, func(rep *wire.Reply) {
			switch {
			case !r.inSync || rep.Status == status.Unavailable:
			case rep.Status != status.OK:
				e.replicaFailed(r, rep)
			default:
				r.intact, r.sealed = true, true
				e.resume(r)
			}
		})
		return
	}
	r.doubt = true
	e.exclude(r, "it lost power, or a flush failed, since the floor")
	for _, c := range e.sortedChunks() {
		whole, any := false, false
		for pos, o := range c.replicas {
			if c.fills[pos] != nil {
				continue
			}
			any = any || o.inSync
			whole = whole || (o.inSync && !o.doubt)
		}
		if any && !whole {
			e.end(fmt.Sprintf("every in-sync replica of chunk %d lost power before a flush was done: attach again to go on from what is durable", c.index))
			return
		}
	}
}

// resume sends a returned in-sync replica what it has not answered.
func (e *Engine) resume(r *replica) {
	if r.excluding && !e.inCall(r) {
		r.excluding = false // it came back before the exclusion was asked for
	}
	for _, j := range e.inFlight.all() {
		for pos, o := range j.c.replicas {
			if o == r {
				e.sendJob(j, pos)
			}
		}
	}
	e.sendFlushes()
	e.retryStuck()
}

// linkDown: every outstanding request is unanswered.
func (e *Engine) linkDown(ev *Down) {
	r := e.replicas[ev.Replica]
	if ev.Gen == r.gen && r.up && e.state != Ended {
		e.linkGone(r, ev.Why)
	}
}

// linkGone forgets the connection, and what was built on it.
func (e *Engine) linkGone(r *replica, why string) {
	e.dropLink(r)
	if r.join != nil {
		e.abortJoin(r, why)
	}
	e.failFills(r, why)
	if e.attach != nil && r.inSync && e.attach.phase > attachExclude {
		e.attach.phase = attachSeal // also when it owed no answer: the list of members has changed
	}
}

// bounce gives the connection up and has the shell make another.
func (e *Engine) bounce(r *replica, why string) {
	r.bouncedAt, r.why = e.now, why
	e.linkGone(r, why)
	e.out.Links = append(e.out.Links, LinkAction{r.index, false}, LinkAction{r.index, true})
}

// bounceFailed gives replicas another chance that failed but cannot be excluded
// now, because too few would be left or metadata does not answer: over a new
// connection they are sealed and sent again what they did not accept.
func (e *Engine) bounceFailed() {
	for _, r := range e.replicas {
		if r.excluding && r.up && !e.inCall(r) && e.now-r.bouncedAt >= bounceEvery {
			e.bounce(r, r.why)
		}
	}
}

// dropLink forgets the connection. Writes wait for the next one, reads go to
// another replica, calls get Unavailable.
func (e *Engine) dropLink(r *replica) {
	r.up, r.sealed = false, false
	var reads []*read
	for i := range r.slots {
		if !r.slots[i].used {
			continue
		}
		switch s := e.freeSlot(r, uint32(i)); {
		case s.job != nil:
			e.orphaned(s.job, s.pos)
		case s.read != nil:
			reads = append(reads, s.read)
		default:
			s.on(&wire.Reply{Status: status.Unavailable, Detail: "connection lost"})
		}
	}
	for _, rd := range reads {
		e.resendRead(rd)
	}
}

// lost: no path leads to the replica.
func (e *Engine) lost(ev *Lost) {
	r := e.replicas[ev.Replica]
	if r.up || e.state == Ended {
		return
	}
	r.lost, r.why = true, ev.Why
	if r.foreign {
		e.lookAgain() // it may have moved
	}
	if r.inSync && e.state != Attaching {
		e.exclude(r, ev.Why)
	}
}

// watchStalls excludes a replica that has made no progress for cfg.Stall while
// another has: when all stand still, or this process did, the gateway suspects
// itself, and the time counts anew from when somebody moves. Those that owe
// nothing are asked for a sign of life in time.
func (e *Engine) watchStalls() {
	slept := e.now-e.lastTick > e.cfg.Stall/2
	e.lastTick = e.now
	if slept {
		e.stillUntil = e.now
	}
	suspects, moving, lively := false, false, false
	for _, r := range e.replicas {
		if r.foreign {
			if r.up && e.waited(r) >= e.cfg.Stall {
				e.bounce(r, "no answer")
			}
			continue
		}
		suspects = suspects || r.up && e.waited(r) >= e.cfg.Stall/2
		moving = moving || r.inSync && r.sealed && e.now-r.lastReply < e.cfg.Stall
		lively = lively || r.inSync && r.sealed && e.now-r.lastReply < e.cfg.Stall/2
	}
	if suspects && !lively {
		e.askForLife()
	}
	if suspects && !moving {
		e.stillUntil = e.now
	}
	for _, r := range e.replicas {
		if r.up && !r.foreign && e.waited(r) >= e.cfg.Stall {
			e.stalled(r)
		}
	}
}

// askForLife pings the members that owe no answer.
func (e *Engine) askForLife() {
	for _, r := range e.replicas {
		if r.inSync && r.sealed && r.busy == 0 {
			e.ping(r)
		}
	}
}

// ping asks for a sign of life, unless an answer to that is awaited.
func (e *Engine) ping(r *replica) {
	if !r.pinging {
		r.pinging = true
		e.call(r, &wire.Request{Kind: wire.Ping}, func(*wire.Reply) { r.pinging = false })
	}
}

// stalled deals with a replica that stands still while others do not.
func (e *Engine) stalled(r *replica) {
	since := e.now - e.stillUntil // others have moved
	why := fmt.Sprintf("no answer for %v", e.cfg.Stall)
	switch {
	case e.state == Attaching: // its limits are those of sealing
		if r.inSync && (e.attach.phase > attachExclude || r.pinging) {
			e.bounce(r, why)
		}
	case since < e.cfg.Stall:
	case r.join != nil:
		e.abortJoin(r, "no progress")
	case !r.inSync:
	case e.mayExclude([]*replica{r}):
		e.exclude(r, why)
	case e.waited(r) >= 2*e.cfg.Stall && since >= 2*e.cfg.Stall:
		e.bounce(r, why+", and too few others to go on without it")
	}
}

// waited says for how long the replica has owed an answer without giving any.
func (e *Engine) waited(r *replica) time.Duration {
	if r.busy == 0 {
		return 0
	}
	oldest := e.now
	for i := range r.slots {
		if r.slots[i].used {
			oldest = min(oldest, r.slots[i].at)
		}
	}
	return e.now - max(oldest, r.lastReply)
}
