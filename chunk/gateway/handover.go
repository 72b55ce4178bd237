package gateway

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A hand-over, of one volume or of all the disks of a VM:
//
//	1 every engine drains and flushes           chunk/volume/handover.go
//	2 each asks to move its epoch; the last one's asking sends the entry for all
//	3 the outcome, once it is known, is every engine's answer: ended, or serving on
//
// Until 2 it can be given up. Between 2 and 3 nothing is served, however long the
// outcome takes: it may be somebody else's volume already.

// Target is who takes volumes over.
type Target struct {
	Host    string
	Session string     // of its gateway, from Session there
	Bind    *pb.BindVM // of the VM whose disks they are, in the same entry; nil: none
}

// handRetry is between two askings of metadata.
const handRetry = 100 * time.Millisecond

// Session returns this gateway process's identity: what HandOver on another host
// takes.
func (g *Gateway) Session() string { return g.session }

// HandOver drains and flushes volumes and moves them, by one metadata entry, to
// the gateway session of another host, whose Attach then waits for nobody. When
// ctx ends before metadata was asked, it is given up; afterwards the outcome is
// waited for. An error other than status.Unknown means that all serve on here;
// their clients have only waited.
func (g *Gateway) HandOver(ctx context.Context, names []string, to Target) error {
	p := &party{g: g, to: to, calls: map[*Volume]*pb.HandOver{}, done: make(chan struct{})}
	defer p.leave()
	for _, name := range names {
		v, err := g.Volume(name)
		if err != nil {
			return err
		}
		if err := p.join(v); err != nil {
			return err
		}
	}
	for _, v := range p.vols {
		v.step(&volume.HandOver{Host: to.Host, Session: to.Session})
		if st := v.State(); st != volume.Draining {
			p.giveUp(status.Errorf(status.Unavailable, "volume %s cannot be handed over: it is %s", v.name, st))
			break
		}
		go p.watch(v)
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.giveUp(status.Errorf(status.Timeout, "volumes %v were not handed over in time: they could not be flushed", names))
		<-p.done
	}
	p.told.Wait()
	if p.err != nil {
		return p.err
	}
	for _, v := range p.vols {
		if g.cfg.Gone != nil {
			g.cfg.Gone(v.name)
		}
		g.forget(v)
	}
	g.log.Info("volumes handed over", "volumes", names, "to", to.Host)
	return nil
}

// party is one hand-over.
type party struct {
	g    *Gateway
	to   Target
	vols []*Volume

	told sync.WaitGroup // engines that have asked and not been told yet
	done chan struct{}  // closed when the outcome is known; err is set before
	err  error

	mu    sync.Mutex // guards the fields below
	calls map[*Volume]*pb.HandOver
	asked bool // metadata was, or is about to be
	over  bool
}

func (p *party) join(v *Volume) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.hand != nil {
		return status.Errorf(status.Conflict, "volume %s is being handed over already: wait for that", v.name)
	}
	v.hand = p
	p.vols = append(p.vols, v)
	return nil
}

func (p *party) leave() {
	for _, v := range p.vols {
		v.mu.Lock()
		v.hand = nil
		v.mu.Unlock()
	}
}

// watch ends the hand-over when a volume does for another reason.
func (p *party) watch(v *Volume) {
	select {
	case <-v.ended:
		p.giveUp(status.Errorf(status.Unknown, "volume %s ended while it was handed over: look who holds it", v.name))
	case <-p.done:
	}
}

// giveUp lets all volumes serve on, unless metadata was asked.
func (p *party) giveUp(err error) {
	p.mu.Lock()
	asked := p.asked || p.over
	if !asked {
		p.finish(err)
	}
	p.mu.Unlock()
	if asked {
		return
	}
	for _, v := range p.vols { // those that have not asked
		v.step(&volume.HandOver{})
	}
}

// finish is called once, with mu held.
func (p *party) finish(err error) {
	p.err, p.over = err, true
	close(p.done)
}

// ask is an engine's question; the last one's is put to metadata. The answer is
// definite: an engine need not ask again. The caller ends p.told.
func (p *party) ask(v *Volume, call *pb.HandOver) error {
	p.mu.Lock()
	p.told.Add(1)
	p.calls[v] = call
	last := len(p.calls) == len(p.vols) && !p.over && !p.asked
	p.asked = p.asked || last
	p.mu.Unlock()
	if last {
		err := p.commit()
		p.mu.Lock()
		p.finish(err)
		p.mu.Unlock()
	}
	<-p.done
	if p.err != nil { // not Conflict or the like, upon which an engine asks again
		return status.Errorf(status.Invalid, "%w", errors.New(p.err.Error()))
	}
	return nil
}

// commit asks until the outcome is known, or the gateway closes.
func (p *party) commit() error {
	op := p.calls[p.vols[0]]
	for _, v := range p.vols[1:] {
		op.Also = append(op.Also, p.calls[v])
	}
	op.Bind = p.to.Bind
	unsure := false
	for {
		_, err := p.g.cfg.Meta.Do(p.g.ctx, &pb.Command{Op: &pb.Command_HandOver{HandOver: op}})
		switch status.Of(err) {
		case status.OK:
			return nil
		case status.Fenced:
			// Done by an earlier asking, or one of them was taken over.
			p.findFenced()
			return status.Errorf(status.Unknown, "the volumes of a hand-over to host %s are no longer all held here: look who holds them (%w)", p.to.Host, err)
		case status.Unknown, status.Timeout, status.Shutdown, status.Unavailable, status.Expired:
			unsure = true
		default:
			return fmt.Errorf("not handed over: %w", err)
		}
		select {
		case <-time.After(handRetry):
		case <-p.g.ctx.Done():
			if !unsure {
				return err
			}
			return status.Errorf(status.Unknown, "whether volumes went to host %s is not known: look who holds them (%w)", p.to.Host, err)
		}
	}
}

// findFenced ends those volumes whose epoch is over before any serves on.
func (p *party) findFenced() {
	for _, v := range p.vols {
		for p.g.ctx.Err() == nil {
			rep, err := p.g.cfg.Meta.Query(p.g.ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: fmt.Sprintf("id:%d", v.id)}})
			if err == nil && len(rep.Volumes) == 1 && rep.Volumes[0].Epoch == uint32(v.epoch) {
				break
			}
			if err == nil || status.Of(err) == status.NotFound {
				p.g.fenced(v, "its hand-over, or another writer's attach, was committed")
				break
			}
			select {
			case <-time.After(handRetry):
			case <-p.g.ctx.Done():
			}
		}
	}
}
