package main

import (
	"net/netip"

	"github.com/cairnstore/cairn/netplane/link"
)

// startPaths begins to keep account of the paths to other hosts. A plane's
// connections leave from the plane's own address.
func (h *hostd) startPaths() {
	cfg := link.PathsConfig{Log: h.log}
	if own := link.SplitAddrs(h.cfg.Data); len(own) > 1 {
		for _, a := range own {
			ap, err := netip.ParseAddrPort(a)
			if err != nil { // a name: the kernel chooses for all
				cfg.Locals = nil
				break
			}
			cfg.Locals = append(cfg.Locals, ap.Addr())
		}
	}
	h.paths = link.NewPaths(cfg)
	h.undo = append(h.undo, h.paths.Close)
}
