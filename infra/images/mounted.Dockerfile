# An image with nothing in it: interpreter and project are mounted read-only. The container tests deploy with it, so that
# nothing is pulled and what runs is this checkout.
FROM scratch
COPY empty /empty
