package gateway

import "github.com/cairnstore/cairn/chunk/volume"

// sharing keeps what some volumes of this host are promised (volume.Sharer): it
// brings the numbers and carries the bounds out. Owned by the tick loop.
type sharing struct {
	sharer volume.Sharer
	on     bool // somebody is promised something, or was at the last step
}

func (s *sharing) step(vs []*Volume) {
	claims := make([]volume.Claim, 0, len(vs))
	promised := false
	for _, v := range vs {
		v.mu.Lock()
		c := v.engine.Claim()
		v.mu.Unlock()
		promised = promised || c.MinIOPS > 0 || c.MinBytes > 0
		claims = append(claims, c)
	}
	if !promised && !s.on {
		return
	}
	s.on = promised
	if !promised { // the last promise is gone: so are all bounds
		s.sharer = volume.Sharer{}
		for _, v := range vs {
			v.step(&volume.Share{})
		}
		return
	}
	for i, sh := range s.sharer.Step(now(), claims) {
		if volume.State(vs[i].state.Load()) != volume.Ended {
			vs[i].step(&sh)
		}
	}
}
