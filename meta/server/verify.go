package server

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/proto/pb"
)

// Whether this node still leads, for reads and leases: that nobody was elected
// before the question.
//
// raft's own way, VerifyLeader, sends a heartbeat and counts who takes it. It goes
// twice through the leader's main loop and once through a follower's (issue 695 is
// why), and each of these loops also writes the log and waits for its disk. So
// enough others are first asked for their term, which nothing waits for. A leader of a
// later term was elected by a majority, each of which had that term in its memory,
// and on its disk, before it gave its vote; terms never fall. If after the question
// a majority, this node counted, still has the term in which this node leads, then
// at the moment of the question nobody had been elected later. No clock is involved.
// A node without a memory, which may have voted and forgotten it, does not say its
// term until it may vote again (member.go), and older programs never do. Where no
// majority says it, raft decides.

// still makes sure, with a majority, that t was not over when still was called.
func (s *Server) still(t *tenure) error {
	if err := s.verify.do(); err != nil {
		return s.notLeader()
	}
	if now, err := s.lead(); err != nil || now != t {
		return s.notLeader()
	}
	return nil
}

// confirm fails if somebody was elected before it was called and this node, whose
// term is checked afterwards, leads in another term than it did then.
func (s *Server) confirm() error {
	r := s.raft.Load()
	if term := r.CurrentTerm(); r.State() == raft.Leader && s.termStands(term) {
		return nil
	}
	return r.VerifyLeader().Error()
}

// askMore is how long those asked have before all the others are asked too. An
// answer takes well below a millisecond; each costs two processes a turn.
const askMore = 2 * time.Millisecond

// termStands reports whether a majority has that term now. As many are asked as
// are needed, the others when one of these does not say so, or is late.
func (s *Server) termStands(term uint64) bool {
	ctx, cancel := context.WithTimeout(s.ctx, s.cfg.Timeout)
	defer cancel() // the first to answer are enough
	all := voters(s.servers())
	missing, rest := len(all)/2+1, make([]raft.Server, 0, len(all))
	for _, v := range all {
		if string(v.ID) == s.id {
			missing--
		} else {
			rest = append(rest, v)
		}
	}
	s.lateness.order(rest)
	said := make(chan answered, len(rest))
	var out []raft.ServerID // asked, and silent
	ask := func(n int) {
		for _, v := range rest[:n] {
			p := s.peerOf(v)
			out = append(out, v.ID)
			go func() { said <- answered{v.ID, s.askTerm(ctx, p) == term} }() // ends with ctx
		}
		rest = rest[n:]
	}
	ask(min(max(missing, 0), len(rest)))
	late := time.NewTimer(askMore)
	defer late.Stop()
	for missing > 0 && len(out) > 0 {
		select {
		case a := <-said:
			out = slices.DeleteFunc(out, func(id raft.ServerID) bool { return id == a.by })
			if a.yes {
				missing--
				continue
			}
			s.lateness.note(a.by)
			ask(len(rest))
		case <-late.C:
			if len(rest) > 0 { // else it was not these that it waited for so long
				s.lateness.note(out...)
				ask(len(rest))
			}
		}
	}
	return missing <= 0
}

type answered struct {
	by  raft.ServerID
	yes bool
}

// lateness remembers who was late with an answer: they are asked last.
type lateness struct {
	mu sync.Mutex
	at map[raft.ServerID]time.Time
}

func (l *lateness) note(ids ...raft.ServerID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.at == nil {
		l.at = map[raft.ServerID]time.Time{}
	}
	for _, id := range ids {
		l.at[id] = time.Now()
	}
}

func (l *lateness) order(servers []raft.Server) {
	l.mu.Lock()
	defer l.mu.Unlock()
	slices.SortStableFunc(servers, func(x, y raft.Server) int { return l.at[x.ID].Compare(l.at[y.ID]) })
}

// askTerm returns a peer's term if its vote counts, or 0.
func (s *Server) askTerm(ctx context.Context, p Peer) uint64 {
	c, err := s.dial(p.APIAddr)
	if err != nil {
		return 0
	}
	rep, err := pb.NewMetaClient(c).Node(ctx, &pb.NodeRequest{TermOnly: true})
	if err != nil || rep.Id != p.ID {
		return 0
	}
	return rep.VotingTerm
}

// votingTerm is the answer to askTerm.
func (s *Server) votingTerm() uint64 {
	r := s.raft.Load()
	if r == nil {
		return 0
	}
	term := r.CurrentTerm()
	if v := s.trans.vote; v != nil {
		if _, may := v.may(term); !may {
			return 0
		}
	}
	return term
}

// verifier lets calls that arrive together share one check with the majority:
// a call counts for a check that begins after it.
type verifier struct {
	check func() error
	done  <-chan struct{} // the node ends

	mu      sync.Mutex // guards both below
	next    *check
	running bool
}

type check struct {
	done chan struct{}
	err  error // set before done is closed
}

func (v *verifier) do() error {
	v.mu.Lock()
	c := v.next
	if c == nil {
		c = &check{done: make(chan struct{})}
		v.next = c
	}
	if !v.running {
		v.running = true
		go v.run() // ends with the queue
	}
	v.mu.Unlock()
	select {
	case <-c.done:
		return c.err
	case <-v.done: // raft forgets what it has not looked at when it shuts down
		return raft.ErrRaftShutdown
	}
}

func (v *verifier) run() {
	for {
		v.mu.Lock()
		c := v.next
		v.next = nil
		if c == nil {
			v.running = false
			v.mu.Unlock()
			return
		}
		v.mu.Unlock()
		c.err = v.check()
		close(c.done)
	}
}
