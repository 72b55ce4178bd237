package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// boottime is CLOCK_BOOTTIME: it counts through suspension and never steps.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("CLOCK_BOOTTIME: " + err.Error()) // Linux has it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// tenure is one term of this node as the leader. What it remembers ends with
// the term.
type tenure struct {
	term   uint64
	since  time.Duration // not before the election
	leases *leases

	ready  sync.Mutex // held while the barrier runs; guards passed
	passed bool       // every command committed by earlier leaders is applied here

	moves moves // of chunks, that placement wants
	care  care  // volumes nobody has attached and that need repair

	mu        sync.Mutex       // guards the fields below
	hosts     map[string]*beat // by name; registered ones only
	fills     map[string]*fill // by the 16 bytes of a store's id
	heat      map[uint64]*volumeHeat
	heatSwept time.Duration
	uses      map[uint64]*uses // by volume
	usesSwept time.Duration
	warned    warned // for those who ask; not changed, but replaced
}

// beat is a host's last heartbeat.
type beat struct {
	at    time.Duration
	usage map[string]*pb.StoreUsage // by the 16 bytes of the store's id
}

// notLeader is the error of every call that only a leader can answer.
func (s *Server) notLeader() error {
	r := s.raft.Load()
	if r == nil {
		return status.Errorf(status.Unavailable, "metadata node %s is starting: it waits for its peers", s.cfg.ID)
	}
	if _, id := r.LeaderWithID(); id != "" && string(id) != s.id {
		return status.Errorf(status.Unavailable, "metadata node %s is not the leader, %s is", nameOf(s.id), nameOf(string(id)))
	}
	return s.noQuorum()
}

// noQuorum names who is missing, asked at most once a second.
func (s *Server) noQuorum() error {
	q := &s.silent
	q.mu.Lock()
	defer q.mu.Unlock()
	n := len(voters(s.servers()))
	if now := boottime(); q.at == 0 || now-q.at > time.Second {
		ctx, cancel := context.WithTimeout(s.ctx, missingTimeout)
		q.names = s.missing(ctx)
		cancel()
		q.at = boottime()
	}
	switch {
	case n == 0:
		return status.Errorf(status.Unavailable, "metadata node %s is in no cluster: `cairn meta add` adds it to one", nameOf(s.id))
	case q.names == "":
		return status.Errorf(status.Unavailable, "the metadata cluster has no leader now: its %d nodes are electing one", n)
	}
	return status.Errorf(status.Unavailable, "the metadata cluster has no leader: %d of its %d nodes must be up, and %s did not answer node %s", n/2+1, n, q.names, nameOf(s.id))
}

const missingTimeout = 500 * time.Millisecond // to find out who does not answer

// silence is who did not answer when last asked.
type silence struct {
	mu    sync.Mutex // guards both below, and lets one ask at a time
	at    time.Duration
	names string
}

// leaderAPI is where to ask instead, "" if unknown.
func (s *Server) leaderAPI() string {
	if r := s.raft.Load(); r != nil {
		if _, id := r.LeaderWithID(); id != "" {
			p, _ := s.member(id)
			return p.APIAddr
		}
	}
	return ""
}

// lead returns the running tenure, ready to serve, or an Unavailable error.
//
// The term is read before and after the state: raft leaves the leader state
// before it raises the term, so an unchanged term means that this node led in
// exactly that term at that moment, and since is not before the election.
func (s *Server) lead() (*tenure, error) {
	r := s.raft.Load()
	if r == nil || s.ctx.Err() != nil {
		return nil, s.notLeader()
	}
	term := r.CurrentTerm()
	if r.State() != raft.Leader || r.CurrentTerm() != term {
		return nil, s.notLeader()
	}
	s.mu.Lock()
	failed := s.err
	if s.tenure == nil || s.tenure.term < term {
		since := boottime()
		s.tenure = &tenure{term: term, since: since, leases: newLeases(since, s.cfg.Lease, clockDrift), hosts: map[string]*beat{}}
	}
	t := s.tenure
	s.mu.Unlock()
	if failed != nil {
		return nil, status.Errorf(status.Unavailable, "metadata node %s has failed: %w", s.cfg.ID, failed)
	}
	if t.term != term {
		return nil, s.notLeader()
	}
	return t, s.makeReady(r, t)
}

// makeReady runs the one barrier of a tenure: after it, what earlier leaders
// committed is applied here.
func (s *Server) makeReady(r *raft.Raft, t *tenure) error {
	t.ready.Lock()
	defer t.ready.Unlock()
	if t.passed {
		return nil
	}
	defer s.flight.begin()()
	if err := s.answer(r.Barrier(enqueueTimeout)); err != nil {
		return status.Errorf(status.Unavailable, "the new metadata leader is not ready: %w", err)
	}
	t.passed = true
	s.log.Info("leading the metadata cluster", "term", t.term)
	return nil
}

// leads reports whether this node takes itself for the leader.
func (s *Server) leads() bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader
}

// watchLeadership begins a tenure as soon as raft says so, not only when
// somebody asks: the wait for older leases counts from then.
func (s *Server) watchLeadership() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case leads := <-s.raft.Load().LeaderCh():
			if !leads {
				s.log.Info("no longer leading the metadata cluster")
				continue
			}
			if _, err := s.lead(); err != nil {
				s.log.Info("elected, and not ready", "err", err)
			}
		}
	}
}

// answer is f's outcome, unless the node ends first: at its shutdown raft drops
// what is committed and waits for the state machine, and answers it never.
func (s *Server) answer(f raft.Future) error {
	got := make(chan error, 1)
	go func() { got <- f.Error() }()
	select {
	case err := <-got:
		return err
	case <-s.done:
		return raft.ErrRaftShutdown
	}
}

// flight counts how many ticks of the watchdog each command in raft has seen.
// Ticks, not time: a process that was stopped for a while has not hung.
type flight struct {
	mu   sync.Mutex // guards both below
	next uint64
	age  map[uint64]int
}

// begin notes a command; the returned function ends it.
func (f *flight) begin() func() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.age == nil {
		f.age = map[uint64]int{}
	}
	f.next++
	id := f.next
	f.age[id] = 0
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.age, id)
	}
}

// tick ages all and returns the oldest age.
func (f *flight) tick() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	oldest := 0
	for id := range f.age {
		f.age[id]++
		oldest = max(oldest, f.age[id])
	}
	return oldest
}

// hungTicks of the watchdog are 10 s: a leader whose command takes longer has a
// hung disk. raft would keep it leader for ever (issue 503), since its
// heartbeats go on.
const hungTicks = 20

// watchdog ends the node when raft has ended or a command hangs, and remembers
// when a node without a memory has caught up.
func (s *Server) watchdog() {
	t := time.NewTicker(s.cfg.tick)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		r := s.raft.Load()
		if s.flight.tick() >= hungTicks && r.State() == raft.Leader && !s.full() {
			s.fail(status.Errorf(status.IO, "a metadata command has hung for %v on the leader: is its disk %s well?", hungTicks*s.cfg.tick, s.dir.path))
			return
		}
		if r.State() == raft.Shutdown && s.ctx.Err() == nil {
			s.fail(s.ended())
			return
		}
		if err := s.putAside(); err != nil {
			s.log.Warn("for a disk that is full", "err", err)
		}
		if err := s.remember(r); err != nil {
			s.fail(err)
			return
		}
	}
}

// ended says why raft has ended.
func (s *Server) ended() error {
	if role(s.servers(), s.id) != "none" {
		return status.Errorf(status.Shutdown, "raft has ended: its log in %s cannot be written", s.dir.path)
	}
	s.dir.mu.Lock()
	defer s.dir.mu.Unlock()
	s.dir.rec.Removed = true
	return errors.Join(status.Errorf(status.Shutdown, "this node was removed from the metadata cluster"), s.dir.save())
}

// remember keeps the record up to date: that there is a log by now, that the
// node has caught up, and who the others are.
func (s *Server) remember(r *raft.Raft) error {
	d := s.dir
	d.mu.Lock()
	defer d.mu.Unlock()
	rec, was, changed := &d.rec, d.rec, false
	if rec.Life != "" && !rec.Added && r.LastIndex() > 0 {
		rec.Added, changed = true, true
	}
	if need := rec.NeedIndex; need > 0 && r.AppliedIndex() >= need {
		rec.NeedIndex, changed = 0, true
		s.log.Info("caught up with the metadata cluster: this node votes again", "index", need)
	}
	if ps := s.members(); role(s.servers(), s.id) != "none" && !slices.Equal(ps, rec.Members) {
		rec.Members, changed = ps, true
	}
	if !changed {
		return nil
	}
	err := d.save()
	if errors.Is(err, unix.ENOSPC) { // at the next tick, then
		*rec = was
		return nil
	}
	return err
}

const enqueueTimeout = time.Second // to get into raft's queue

// commit puts a command through raft and returns what the state machine said.
func (s *Server) commit(b []byte) (*pb.Result, error) {
	defer s.flight.begin()()
	f := s.raft.Load().Apply(b, enqueueTimeout)
	if err := s.answer(f); err != nil {
		switch {
		case errors.Is(err, raft.ErrNotLeader):
			return nil, s.notLeader()
		case errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrLeadershipTransferInProgress):
			return nil, status.Errorf(status.Unavailable, "the metadata leader is overloaded (%w): ask again", err)
		}
		return nil, status.Errorf(status.Unknown, "whether the command was done is unknown (%w): ask again with the same number", err)
	}
	if res, ok := f.Response().(*pb.Result); ok {
		return res, nil
	}
	return nil, status.Errorf(status.Unknown, "whether the command was done is unknown (this node has ended): ask again with the same number")
}

// answerTime is kept of a caller's deadline to tell it why.
const answerTime = 50 * time.Millisecond

// waitUntil waits for a moment of CLOCK_BOOTTIME, or says why not: the caller's
// time is nearly up, or this node is closing.
func (s *Server) waitUntil(ctx context.Context, end time.Duration) error {
	if d, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, d.Add(-answerTime))
		defer cancel()
	}
	for {
		left := end - boottime()
		if left <= 0 {
			return nil
		}
		t := time.NewTimer(left)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%v are left of it", (end - boottime()).Round(time.Millisecond))
		case <-s.ctx.Done():
			t.Stop()
			return status.Errorf(status.Shutdown, "this node is closing")
		}
	}
}
