package gateway

import (
	"context"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A maintenance session repairs a volume nobody has attached: members that are
// out, copies to be made elsewhere. It is an ordinary attach without exports,
// which anybody's attach ends; the metadata leader says which volumes need one.
const (
	careAtOnce = 2                // of a host
	careLook   = time.Second      // between looks whether all is well
	careMost   = 20 * time.Minute // then others have their turn
)

// hearWishes keeps what placement wants, for the sessions that begin by it.
func (g *Gateway) hearWishes(ws []*pb.VolumeWishes) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wishes = map[uint64]*pb.VolumeWishes{}
	for _, w := range ws {
		g.wishes[w.VolumeId] = w
	}
}

// careFor begins sessions for volumes the leader has named.
func (g *Gateway) careFor(names []string) {
	for _, name := range names {
		g.mu.Lock()
		begin := !g.closed && len(g.care) < careAtOnce && g.volumes[name] == nil && g.attaching[name] == nil
		if _, ok := g.care[name]; ok {
			begin = false
		}
		if begin {
			g.care[name] = nil
			g.wg.Add(1)
			go g.careOne(name)
		}
		g.mu.Unlock()
	}
}

func (g *Gateway) careOne(name string) {
	defer g.wg.Done()
	err := g.repair(name)
	g.mu.Lock()
	v := g.care[name]
	delete(g.care, name)
	g.mu.Unlock()
	if v != nil {
		v.close()
	}
	if err != nil && g.ctx.Err() == nil && status.Of(err) != status.Held {
		g.log.Warn("volume not repaired", "volume", name, "err", err)
	}
}

// repair attaches, waits until nothing is left to do, and lets go.
func (g *Gateway) repair(name string) error {
	ctx, cancel := context.WithTimeout(g.ctx, careMost)
	defer cancel()
	at := &pb.Attach{Volume: name, Host: g.cfg.Host, Session: g.session, Maintenance: true}
	res, err := g.cfg.Meta.Do(ctx, &pb.Command{Op: &pb.Command_Attach{Attach: at}})
	if err != nil {
		return err
	}
	cfg := volume.Config{Chunks: res.Chunks}
	if cfg.Origins, err = g.origins(ctx, res.Volume); err != nil {
		return err
	}
	v, err := newVolume(g, res.Volume, cfg, "")
	if err != nil {
		return err
	}
	g.mu.Lock()
	g.care[name] = v
	wishes := g.wishes[res.Volume.Id]
	g.mu.Unlock()
	if wishes != nil {
		v.step(&volume.Wish{Moves: wishes.Wishes})
	}
	g.log.Info("repairing a volume that is not attached", "volume", name, "epoch", res.Volume.Epoch)
	look := time.NewTicker(careLook)
	defer look.Stop()
	for ctx.Err() == nil {
		select {
		case <-v.ended: // somebody has attached it
			return nil
		case <-ctx.Done():
		case <-look.C:
			if in := v.Info(); in.State == volume.Serving && in.Caring == "" {
				return g.careOver(v)
			}
		}
	}
	return g.careOver(v)
}

// careOver lets go; what cannot be flushed now is left to the next attach.
func (g *Gateway) careOver(v *Volume) error {
	ctx, cancel := context.WithTimeout(g.ctx, renewTimeout)
	defer cancel()
	v.step(&volume.Detach{})
	select {
	case <-v.ended:
		v.wg.Wait()
		return v.detachErr()
	case <-ctx.Done():
		return status.Errorf(status.Timeout, "it is not let go in time: %s", v.Info().Why)
	}
}

// caring lists the volumes under repair, for the renewal of their epochs.
func (g *Gateway) caring() []*Volume {
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []*Volume
	for _, v := range g.care {
		if v != nil {
			out = append(out, v)
		}
	}
	return out
}
