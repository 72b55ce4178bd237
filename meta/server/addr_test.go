package server

import "testing"

func TestAddressesOfANode(t *testing.T) {
	for _, p := range []Peer{{RaftAddr: "a:1", APIAddr: "a:2"}, {RaftAddr: "a:1,b:1,c:1", APIAddr: "a:2,b:2,c:2"}, {RaftAddr: "a:1"}} {
		if r, a := cutAddr(joinAddr(p)); r != p.RaftAddr || a != p.APIAddr {
			t.Errorf("%+v became %q and %q", p, r, a)
		}
	}
	if r, a := cutAddr("a:1"); r != "a:1" || a != "" {
		t.Errorf("an old address became %q and %q", r, a)
	}
}
