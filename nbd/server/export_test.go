package server

import "time"

// StandStill makes s believe that the process last ran d ago.
func (s *Server) StandStill(d time.Duration) { s.beat.Store(int64(s.now() - d)) }

// Pulse is one beat of the heart.
func (s *Server) Pulse() { s.pulse(s.now()) }

// All is how many connections there are, half-open ones included.
func (s *Server) All() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Held sums what all connections hold of their budgets.
func (s *Server) Held() (requests, bytes int) {
	for _, c := range s.pick(func(c *conn) bool { return c.open }) {
		c.mu.Lock()
		requests += c.requests
		bytes += c.bytes
		c.mu.Unlock()
	}
	return requests, bytes
}

// Leaving is how many connections were asked to end.
func (s *Server) Leaving() int {
	n := 0
	for _, c := range s.pick(func(*conn) bool { return true }) {
		c.mu.Lock()
		if c.leaving != staying {
			n++
		}
		c.mu.Unlock()
	}
	return n
}
