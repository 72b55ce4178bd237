package gateway

import (
	"context"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
)

const (
	tickEvery    = 50 * time.Millisecond
	renewTimeout = 2 * time.Second // of one renewal; the next follows at once
)

// RenewNow asks for a heartbeat without waiting for its turn.
func (g *Gateway) RenewNow() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// renewLoop is the host's heartbeat: one call names every lease.
func (g *Gateway) renewLoop() {
	defer g.wg.Done()
	t := time.NewTicker(g.cfg.Renew)
	defer t.Stop()
	for {
		if err := g.renew(); err != nil && g.ctx.Err() == nil {
			g.log.Warn("leases not renewed", "err", err)
		}
		select {
		case <-g.ctx.Done():
			return
		case <-t.C:
		case <-g.kick:
		}
	}
}

func (g *Gateway) renew() error {
	req := &pb.RenewRequest{Host: g.cfg.Host, Session: g.session}
	if g.cfg.Usage != nil {
		req.Usage = g.cfg.Usage()
	}
	if g.cfg.Say != nil {
		g.cfg.Say(req)
	}
	byID := map[ids.VolumeID]*Volume{}
	for _, v := range append(g.caring(), g.Volumes()...) { // attached here after all: that one counts
		if v.State() != volume.Ended {
			byID[v.id] = v
			req.Leases = append(req.Leases, &pb.Lease{VolumeId: uint64(v.id), Epoch: uint32(v.epoch)})
		}
	}
	ctx, cancel := context.WithTimeout(g.ctx, renewTimeout)
	defer cancel()
	sent := now()
	req.Heat = g.heatReport(sent)
	rep, err := g.cfg.Meta.Renew(ctx, req)
	if err != nil {
		return err
	}
	g.hearWishes(rep.Wishes)
	g.careFor(rep.Maintain)
	if g.cfg.Heard != nil {
		g.cfg.Heard(rep)
	}
	for _, l := range rep.Refused {
		if v := byID[ids.VolumeID(l.VolumeId)]; v != nil && uint32(v.epoch) == l.Epoch {
			delete(byID, v.id)
			g.fenced(v, "metadata has given the volume to another writer")
		}
	}
	for _, pv := range rep.Volumes {
		if v := byID[ids.VolumeID(pv.Id)]; v != nil {
			v.step(&volume.Refresh{Volume: pv})
		}
	}
	for _, w := range rep.Wishes {
		if v := byID[ids.VolumeID(w.VolumeId)]; v != nil {
			v.step(&volume.Wish{Moves: w.Wishes})
		}
	}
	for _, v := range byID {
		v.step(&volume.Lease{Until: sent + time.Duration(rep.LeaseMs)*time.Millisecond})
	}
	return nil
}

// fenced ends a volume whose epoch is over.
func (g *Gateway) fenced(v *Volume, why string) {
	g.log.Warn("volume fenced", "volume", v.name, "epoch", v.epoch, "why", why)
	v.step(&volume.Fence{Why: why, Fenced: true})
}

// tickLoop lets time pass for every engine and drops the exports of those that
// have ended.
func (g *Gateway) tickLoop() {
	defer g.wg.Done()
	t := time.NewTicker(tickEvery)
	defer t.Stop()
	told := map[*Volume]bool{}
	var shares sharing
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-t.C:
		}
		live := map[*Volume]bool{}
		for _, v := range append(g.Volumes(), g.Shown()...) {
			live[v] = true
			switch {
			case v.State() != volume.Ended:
				v.step(&volume.Tick{})
				v.followAddr()
			case !told[v]:
				told[v] = true
				if g.cfg.Gone != nil {
					g.cfg.Gone(v.name)
				}
			}
		}
		for _, v := range g.caring() { // they have no exports to drop
			if v.State() != volume.Ended {
				v.step(&volume.Tick{})
				v.followAddr()
			}
		}
		shares.step(g.Volumes())
		for v := range told {
			if !live[v] {
				delete(told, v)
			}
		}
	}
}

// followAddr dials anew where a lost replica's host has moved.
func (v *Volume) followAddr() {
	v.mu.Lock()
	defer v.mu.Unlock()
	var moved []volume.LinkAction
	for _, p := range v.peers {
		if p == nil || p.local || p.link == nil || p.live {
			continue
		}
		if r := v.engine.Replica(p.replica); r.Addr != p.addr {
			p.addr = r.Addr
			moved = append(moved, volume.LinkAction{Replica: p.replica, Open: true})
		}
	}
	v.links.add(moved)
}
