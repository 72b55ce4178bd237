package gateway

import (
	"context"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/status"
)

// Session returns this gateway process's identity: what HandOver on another host
// takes.
func (g *Gateway) Session() string { return g.session }

// HandOver drains and flushes a volume and moves it, by one metadata entry, to
// the gateway session of another host, whose Attach then waits for nobody. An
// error other than status.Unknown means that the volume serves on here; its
// clients have only waited.
func (g *Gateway) HandOver(ctx context.Context, name, host, session string) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if err := v.handOver(ctx, host, session); err != nil {
		return err
	}
	if g.cfg.Gone != nil {
		g.cfg.Gone(name)
	}
	g.forget(v)
	g.log.Info("volume handed over", "volume", name, "to", host)
	return nil
}

func (v *Volume) handOver(ctx context.Context, host, session string) error {
	done := make(chan error, 1)
	v.mu.Lock()
	busy := v.hand != nil
	if !busy {
		v.hand = done
	}
	v.mu.Unlock()
	if busy {
		return status.Errorf(status.Conflict, "volume %s is being handed over already: wait for that", v.name)
	}
	v.step(&volume.HandOver{Host: host, Session: session})
	if st := v.State(); st != volume.Draining {
		v.handed(status.Errorf(status.Unavailable, "volume %s cannot be handed over: it is %s", v.name, st))
	}
	select {
	case err := <-done:
		return err
	case <-v.ended:
		v.wg.Wait() // whoever brought the answer has told it
		select {
		case err := <-done:
			return err
		default:
			return status.Errorf(status.Unknown, "volume %s ended while it was handed over: look who holds it", v.name)
		}
	case <-ctx.Done():
	}
	v.step(&volume.HandOver{}) // gives it up, unless metadata was asked
	v.mu.Lock()
	v.hand = nil
	v.mu.Unlock()
	if v.State() == volume.Serving {
		return status.Errorf(status.Timeout, "volume %s was not handed over in time: it could not be flushed", v.name)
	}
	return status.Errorf(status.Unknown, "whether volume %s was handed over is not known: look who holds it", v.name)
}

// handed tells whoever waits what became of the hand-over, once that is known.
func (v *Volume) handed(err error) {
	switch status.Of(err) {
	case status.Unavailable, status.Unknown, status.Timeout, status.Shutdown, status.Conflict:
		if v.State() == volume.Draining {
			return // the engine asks again
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.hand != nil {
		v.hand <- err
		v.hand = nil
	}
}
