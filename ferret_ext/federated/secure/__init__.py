"""Secure aggregation: the server learns the sum of a round's updates and no single one of them.

After Bonawitz et al. (https://eprint.iacr.org/2017/281), on a basis that all clients of a round share. Client
i's coordinates, as integers x_i modulo 2^32 (`integers`), leave it as

    y_i = x_i + stream(b_i) + sum_{j > i} stream(s_ij) - sum_{j < i} stream(s_ij)

with a seed b_i of its own, and one s_ij with each other client of the round. In a round (`assembly` for the
server, `participant` for a client):

    keys     every client that was drawn makes a key for this round alone; those that answer take part
    update   with everybody's public keys a client has the s_ij; it sends y_i, and shares of b_i for each of
             the others, encrypted for it (any t shares give b_i, fewer say nothing; t is more than half)
    pairs    only where updates are missing: those who sent one give the s_ij that they have with those who
             did not. Who does not answer is missing too, and it is asked again
    shares   at least t of the rest give their shares of the b_i of the rest

Then the server can take all masks from the sum. A client gives the seed that it has with another one, or its
share of the other's seed, and never both; and shares for one sum a round.
"""
