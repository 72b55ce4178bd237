package gateway

import (
	"context"
	"sync"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// maxBatch bounds the changes of one command.
const maxBatch = 256

// memberBatch commits the membership changes of all volumes: those that come
// while a command is on its way go together in the next one, so that a host
// that dies costs a gateway two commands and not one per volume.
type memberBatch struct {
	ctx  context.Context
	meta Meta

	mu      sync.Mutex // guards the fields below
	waiting []*memberCall
	running bool
}

type memberCall struct {
	change *pb.MemberChange
	done   chan struct{}
	res    *pb.MemberResult
	err    error
}

func newMemberBatch(ctx context.Context, meta Meta) *memberBatch {
	return &memberBatch{ctx: ctx, meta: meta}
}

// do commits the one change of an engine's call.
func (b *memberBatch) do(ctx context.Context, c *pb.ChangeMembers) (*pb.Result, error) {
	call := &memberCall{change: c.Changes[0], done: make(chan struct{})}
	b.mu.Lock()
	b.waiting = append(b.waiting, call)
	if !b.running {
		b.running = true
		go b.run()
	}
	b.mu.Unlock()
	select {
	case <-call.done:
	case <-ctx.Done():
		return nil, status.Errorf(status.Unavailable, "the volume was closed before its membership changed")
	}
	if call.err != nil {
		return nil, call.err
	}
	return &pb.Result{Members: []*pb.MemberResult{call.res}}, nil
}

func (b *memberBatch) run() {
	for {
		b.mu.Lock()
		n := min(len(b.waiting), maxBatch)
		if n == 0 {
			b.running = false
			b.mu.Unlock()
			return
		}
		batch := b.waiting[:n:n]
		b.waiting = b.waiting[n:]
		b.mu.Unlock()
		b.commit(batch)
	}
}

func (b *memberBatch) commit(batch []*memberCall) {
	all := &pb.ChangeMembers{}
	for _, c := range batch {
		all.Changes = append(all.Changes, c.change)
	}
	res, err := b.meta.Do(b.ctx, &pb.Command{Op: &pb.Command_ChangeMembers{ChangeMembers: all}})
	if err == nil && len(res.Members) != len(batch) {
		err = status.Errorf(status.Internal, "metadata answered %d membership changes with %d results", len(batch), len(res.Members))
	}
	for i, c := range batch {
		if c.err = err; err == nil {
			c.res = res.Members[i]
		}
		close(c.done)
	}
}
